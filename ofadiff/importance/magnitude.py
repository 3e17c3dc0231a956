"""Magnitude: how large the weights of a unit are. Needs no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.importance.matrices import scored_slices


@torch.no_grad()
def magnitude(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """L2 norm of every row (writers) or column (readers), summed over the matrices that a unit touches.

    Args:
        model: The denoiser.
        groups: Its channel groups.
        batches: Not read.
        loss_fn: Not called.

    Returns:
        For every group its scores, shape `(width,)`, float32.
    """
    scores = {}
    for group in groups:
        total = torch.zeros(group.width)
        for part in scored_slices(model, group):
            weight = model.get_submodule(part.module).weight.float()
            rows = weight if part.axis == "out" else weight.transpose(0, 1)
            total += part.per_unit(rows.flatten(1).norm(dim=1)).cpu()
        scores[group.name] = total
    return scores

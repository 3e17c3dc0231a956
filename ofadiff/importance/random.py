"""Random scores: what any other criterion has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup


def random(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Uniform scores in [0, 1).

    Args:
        model: The denoiser.
        groups: Its channel groups.
        batches: Not read.
        loss_fn: Not called.
        seed: The same seed gives the same scores.

    Returns:
        For every group its scores, shape `(width,)`, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.width, generator=generator) for group in groups}

"""Sensitivity of the output: what a unit does to it, where no loss says what it should have been.

Against its own answers the original's loss is zero, and so are its gradients. To first order the output y changes by
Δy = Σ_{w ∈ c} w · ∂y/∂w without channel c. For a random direction v with E[v vᵀ] = I the product v · Δy has the mean
square ‖Δy‖² (Hutchinson's estimator), and v · Δy = Σ_{w ∈ c} w · ∂(v · y)/∂w is equation 4 with v · y as the loss. The
mean of |v · Δy| over samples ranks better than the mean of squares, in which few samples decide (docs/log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.importance.taylor import taylor


def sensitivity(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """What each unit does to the output, to first order, along a random direction for each sample; needs no target.

    Args:
        model: The denoiser, not elastic yet.
        groups: Its channel groups.
        batches: Batches for `loss_fn`; at least one.
        loss_fn: `loss_fn(model, batch)` gives the output, `(N, …)`, in place of a loss.
        seed: Of the directions.

    Returns:
        For every group its scores, shape `(width,)`, float32.

    Raises:
        ValueError: If batches or the output are missing, there is no batch, or an output is not `(N, …)` or not finite.
    """
    if batches is None or loss_fn is None:
        raise ValueError("criterion 'sensitivity' needs batches, and in place of loss_fn what gives the output")
    numbers = itertools.count()

    def projection(model: nn.Module, batch: Any) -> torch.Tensor:
        output = loss_fn(model, batch)
        if output.ndim < 2:
            raise ValueError(
                f"loss_fn gave a tensor of shape {tuple(output.shape)}; for criterion 'sensitivity' it must be the "
                "output, (N, …)"
            )
        generator = torch.Generator().manual_seed(seed + next(numbers))
        signs = torch.randint(2, output.shape, generator=generator).to(output.device, torch.float32) * 2 - 1
        return (output.float() * signs).flatten(1).sum(dim=1) / signs[0].numel() ** 0.5

    return taylor(model, groups, batches, projection)

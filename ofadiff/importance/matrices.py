"""Which tensors of a group carry its importance."""

from __future__ import annotations

from torch import nn

from ofadiff.channels import ChannelGroup, Slice

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def scored_slices(model: nn.Module, group: ChannelGroup) -> list[Slice]:
    """The slices of a group's linear maps and convolutions; norms and biases carry no score (eq. 4 sums weights)."""
    return [part for part in group.slices if isinstance(model.get_submodule(part.module), MATRICES)]

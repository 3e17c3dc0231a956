"""Elastic layers: stock layers that compute with the active part of their own parameters.

An elastic class differs from the stock class in nothing but its forward: parameters, hooks and state-dict keys stay
those of the layer it was made from. At full width `kept` is empty and the stock computation runs. `updates` holds what
the adapter of the size that is set adds to the layer, if there is one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ofadiff.channels import Kept, active_part


class LowRankUpdate(nn.Module):
    """What the LoRA of one size adds to a layer's weight at that size: W + scaling · B A.

    Its matrices have that size's shape. They move with the layer that it is put into, but are in no state dict.

    Args:
        down: A, `(rank, in)`, or `(rank, in, height, width)` for a convolution.
        up: B, `(out, rank)`, or `(out, rank, 1, 1)`.
        scaling: Their factor.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.scaling = scaling

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W + scaling · B A for a weight of that shape: A and B in its dtype, the sum in float32."""
        down, up = (side.to(weight).float().flatten(1) for side in (self.down, self.up))
        return weight.float() + self.scaling * (up @ down).view(self.shape)


class ElasticLinear(nn.Linear):
    """A linear map whose rows and columns can be cut to the active units of their groups."""

    kept: Kept = ()
    updates: tuple[LowRankUpdate, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _active(self)
        output = F.linear(input, weight, bias)
        for update in self.updates:
            output = output + update.scaling * F.linear(F.linear(input, update.down), update.up)
        return output


class ElasticConv2d(nn.Conv2d):
    """A convolution whose output and input channels can be cut to the active units of their groups."""

    kept: Kept = ()
    updates: tuple[LowRankUpdate, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _active(self)
        output = self._conv_forward(input, weight, bias)
        for update in self.updates:
            output = output + update.scaling * F.conv2d(self._conv_forward(input, update.down, None), update.up)
        return output


class ElasticGroupNorm(nn.GroupNorm):
    """A group norm that keeps whole normalisation groups, so a kept channel is normalised as in the full model."""

    kept: Kept = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _active(self)
        return F.group_norm(input, active_norm_groups(self.num_groups, self.kept), weight, bias, self.eps)


# A new kind of layer is one class and one line here.
ELASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ElasticLinear,
    nn.Conv2d: ElasticConv2d,
    nn.GroupNorm: ElasticGroupNorm,
}


def _active(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not layer.kept:
        return layer.weight, layer.bias
    weight = None if layer.weight is None else active_part(layer.weight, "weight", layer.kept)
    bias = None if layer.bias is None else active_part(layer.bias, "bias", layer.kept)
    return weight, bias


def active_norm_groups(num_groups: int, kept: Kept) -> int:
    """Normalisation groups that are left of `num_groups`; every unit is the same number of whole groups."""
    for part, units in kept:
        num_groups = num_groups * units // part.units
    return num_groups


def check_elastic_type(layer: nn.Module, name: str) -> None:
    """Raises TypeError if there is no elastic class for exactly this type of layer."""
    if type(layer) not in ELASTIC:
        known = ", ".join(sorted(stock.__name__ for stock in ELASTIC))
        raise TypeError(f"{name} is a {type(layer).__name__}; elastic layers exist for {known}")


def make_elastic(layer: nn.Module, name: str) -> None:
    """Turns a stock layer into its elastic class, in place.

    Raises:
        TypeError: If there is no elastic class for exactly this type.
    """
    check_elastic_type(layer, name)
    layer.__class__ = ELASTIC[type(layer)]


def shrink(layer: nn.Module, name: str, kept: Kept) -> None:
    """Cuts a stock layer, in place, down to what `kept` leaves: a smaller stock layer.

    Raises:
        TypeError: If there is no elastic class for exactly this type.
    """
    check_elastic_type(layer, name)
    for parameter, full in list(layer.named_parameters(recurse=False)):
        part = active_part(full.detach(), parameter, kept).clone(memory_format=torch.contiguous_format)
        setattr(layer, parameter, nn.Parameter(part, requires_grad=full.requires_grad))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = active_norm_groups(layer.num_groups, kept)
        for part, units in kept:
            layer.num_channels -= (part.units - units) * part.channels * part.repeats

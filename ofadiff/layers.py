"""Elastic layers: stock layers that compute with the active part of their own parameters.

An elastic class differs from the stock class in nothing but its forward: parameters, hooks and state-dict keys stay
those of the layer it was made from. At full width `kept` is empty and the stock computation runs. `updates` holds what
the adapter of the size that is set adds to the layer, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import GlobalResponseNorm, RMSNorm
from diffusers.models.unets import unet_stable_cascade
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ofadiff.channels import Kept, active_part
from ofadiff.quantized import active_parameter, storage_of


class LowRankUpdate(nn.Module):
    """What the LoRA of one size adds to a layer's weight at that size: W + scaling · B A.

    Its matrices have that size's shape. They move with the layer that it is put into, but are in no state dict.

    Args:
        down: A, `(rank, in)`, or `(rank, in, *kernel)` for a convolution.
        up: B, `(out, rank)`, or `(out, rank, 1, …)`.
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


class ElasticConv1d(nn.Conv1d):
    """A one-dimensional convolution that can be cut as a two-dimensional one."""

    kept: Kept = ()
    updates: tuple[LowRankUpdate, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolution(self, input)


class ElasticConv2d(nn.Conv2d):
    """A convolution whose output and input channels can be cut to the active units of their groups."""

    kept: Kept = ()
    updates: tuple[LowRankUpdate, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolution(self, input)


class ElasticConv3d(nn.Conv3d):
    """A three-dimensional convolution that can be cut as a two-dimensional one."""

    kept: Kept = ()
    updates: tuple[LowRankUpdate, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolution(self, input)


class ElasticGroupNorm(nn.GroupNorm):
    """A group norm that keeps whole normalisation groups, so a kept channel is normalised as in the full model."""

    kept: Kept = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[1] == 0:
            return input
        weight, bias = _active(self)
        return F.group_norm(input, active_norm_groups(self.num_groups, self.kept), weight, bias, self.eps)


class ElasticLayerNorm(nn.LayerNorm):
    """A layer norm over the channels that are active; their mean and variance stand for those of all."""

    kept: Kept = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _active(self)
        return F.layer_norm(input, input.shape[-1:], weight, bias, self.eps)


class ElasticTorchRMSNorm(nn.RMSNorm):
    """PyTorch's RMS norm over the channels that are active; their mean square stands for that of all."""

    kept: Kept = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else active_part(self.weight, "weight", self.kept)
        return F.rms_norm(input, input.shape[-1:], weight, self.eps)


class ElasticRMSNorm(RMSNorm):
    """diffusers' RMS norm over the channels that are active; their mean square stands for that of all."""

    kept: Kept = ()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            return super().forward(hidden_states)
        weight, bias = _active(self)
        mean_square = hidden_states.float().square().mean(-1, keepdim=True)
        normed = hidden_states * torch.rsqrt(mean_square + self.eps)
        if weight is None:
            return normed.to(hidden_states.dtype)
        normed = (normed if weight.dtype == torch.float32 else normed.to(weight.dtype)) * weight
        return normed if bias is None else normed + bias


class ElasticGlobalResponseNorm(GlobalResponseNorm):
    """A global response norm that compares a channel with those that are active."""

    kept: Kept = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _global_response_norm(self, x)


class ElasticCascadeGlobalResponseNorm(unet_stable_cascade.GlobalResponseNorm):
    """Stable Cascade's copy of the global response norm."""

    kept: Kept = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _global_response_norm(self, x)


class EmptyConv1d(nn.Conv1d):
    """A one-dimensional convolution like `EmptyConv2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolved(self, input, self.weight, self.bias)


class EmptyConv2d(nn.Conv2d):
    """A convolution to no channels, or from none: PyTorch's own refuses them. From none, its bias is left."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolved(self, input, self.weight, self.bias)


class EmptyConv3d(nn.Conv3d):
    """A three-dimensional convolution like `EmptyConv2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _convolved(self, input, self.weight, self.bias)


class EmptyGroupNorm(nn.GroupNorm):
    """A group norm of no channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


# What becomes of layers that lose all channels on one side. A linear map computes as before; quantizers leave it alone.
EMPTY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NonDynamicallyQuantizableLinear,
    nn.Conv1d: EmptyConv1d,
    nn.Conv2d: EmptyConv2d,
    nn.Conv3d: EmptyConv3d,
    nn.GroupNorm: EmptyGroupNorm,
}

# A new kind of layer is one class and one line here.
ELASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ElasticLinear,
    nn.Conv1d: ElasticConv1d,
    nn.Conv2d: ElasticConv2d,
    nn.Conv3d: ElasticConv3d,
    nn.GroupNorm: ElasticGroupNorm,
    nn.LayerNorm: ElasticLayerNorm,
    nn.RMSNorm: ElasticTorchRMSNorm,
    RMSNorm: ElasticRMSNorm,
    GlobalResponseNorm: ElasticGlobalResponseNorm,
    unet_stable_cascade.GlobalResponseNorm: ElasticCascadeGlobalResponseNorm,
}

# Norms whose statistics are those of all channels together: cut, they are those of the active ones.
NORMS_OVER_CHANNELS = (
    nn.LayerNorm,
    nn.RMSNorm,
    RMSNorm,
    GlobalResponseNorm,
    unet_stable_cascade.GlobalResponseNorm,
)


def _global_response_norm(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gamma, beta = (active_part(parameter, name, layer.kept) for name, parameter in layer.named_parameters())
    energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    return gamma * (x * (energy / (energy.mean(dim=-1, keepdim=True) + 1e-6))) + beta + x


def _convolution(layer: nn.Module, input: torch.Tensor) -> torch.Tensor:
    weight, bias = _active(layer)
    output = _convolved(layer, input, weight, bias)
    if 0 in weight.shape[:2]:
        return output
    for update in layer.updates:
        inner = layer._conv_forward(input, update.down, None)
        output = output + update.scaling * torch.einsum("or,nr...->no...", update.up.flatten(1), inner)
    return output


def _convolved(layer: nn.Module, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's convolution with this weight, which may have no channels on a side."""
    if 0 not in weight.shape[:2]:
        return layer._conv_forward(input, weight, bias)
    padding = layer._reversed_padding_repeated_twice[::-1]
    lengths = [
        (length + padding[2 * axis] + padding[2 * axis + 1] - dilation * (kernel - 1) - 1) // stride + 1
        for axis, (length, dilation, kernel, stride) in enumerate(
            zip(input.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True)
        )
    ]
    kind = input.device.type
    # Of the meta device PyTorch does not know it; torch.compile of 2.8 cannot ask `is_autocast_available`.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else input.dtype
    everywhere = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return everywhere.to(dtype).view(-1, *(1 for _ in lengths)).expand(input.shape[0], -1, *lengths)


class _Cut(NamedTuple):
    """What a layer keeps, which state of its weights it was cut from, and the parts."""

    kept: Kept
    written: list[tuple[int, int]]
    parts: tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class _Cuts:
    """The last cuts of layers, at most so many of each."""

    most: int
    by_layer: dict[nn.Module, list[_Cut]] = field(default_factory=dict)


_cuts: ContextVar[_Cuts | None] = ContextVar("_cuts", default=None)


@contextmanager
def cut_once(sizes: int = 1) -> Iterator[None]:
    """A block in which no weight changes: layers cut their weights once per size, not at every forward.

    For forwards without gradients; compiled ones go on cutting. What was cut is held until the block ends, which takes
    up to the memory of the extracted models' weights. Weights that change all the same are cut anew if PyTorch counts
    the change; it does not count what is written through `.data`.

    Args:
        sizes: How many sizes are held, those that were used last: more than one where forwards alternate.
    """
    token = _cuts.set(_Cuts(sizes))
    try:
        yield
    finally:
        _cuts.reset(token)


def _active(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    kept = layer.kept
    if not kept:
        return layer.weight, layer.bias
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or (cuts := _cuts.get()) is None:
        return _cut(layer)
    written = _written(layer)
    held = cuts.by_layer.setdefault(layer, [])
    for cut in held:
        if cut.kept is kept and cut.written == written:
            return cut.parts
    weight, bias = _cut(layer)
    # Rows of the full weight need no copy; columns are strewn over it, which every product would pay for.
    parts = weight if weight is None or weight.is_contiguous() else weight.clone(), bias
    others = [cut for cut in held if cut.kept is not kept]
    held[:] = [*others, _Cut(kept, written, parts)][-cuts.most :]
    return parts


def _written(layer: nn.Module) -> list[tuple[int, int]]:
    """Where a layer's parameters lie, and how often each was written to."""
    parameters = [storage_of(parameter) for parameter in layer._parameters.values() if parameter is not None]
    try:
        return [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    except RuntimeError:  # inference tensors do not count
        return [(parameter.data_ptr(), 0) for parameter in parameters]


def _cut(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = None if layer.weight is None else active_parameter(layer.weight, "weight", layer.kept)
    bias = None if layer.bias is None else active_part(layer.bias, "bias", layer.kept)
    return weight, bias


def active_norm_groups(num_groups: int, kept: Kept) -> int:
    """Normalisation groups that are left of `num_groups`; every unit is the same number of whole groups."""
    for part, units in kept:
        num_groups = num_groups * units // part.units
    return num_groups


def is_adaptable(layer: nn.Module) -> bool:
    """Whether `updates` can act on a layer: a linear map, or a convolution that sees all channels at once."""
    convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1
    return convolution or isinstance(layer, nn.Linear)


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
        if 0 in layer.weight.shape:
            layer.__class__ = EMPTY[nn.Linear]
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        if layer.groups > 1:
            layer.groups = layer.in_channels = layer.out_channels
        elif 0 in layer.weight.shape[:2]:
            layer.__class__ = EMPTY[type(layer)]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = active_norm_groups(layer.num_groups, kept)
        layer.num_channels -= _dropped(kept)
        if layer.num_channels == 0:
            layer.__class__ = EMPTY[nn.GroupNorm]
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        layer.normalized_shape = (layer.normalized_shape[-1] - _dropped(kept),)
    elif isinstance(layer, RMSNorm):
        layer.dim = torch.Size((layer.dim[-1] - _dropped(kept),))


def _dropped(kept: Kept) -> int:
    """Channels that a norm loses."""
    return sum((part.units - units) * part.channels * part.repeats for part, units in kept)

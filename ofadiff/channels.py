"""Channel groups: internal channels that exist together, and the part of a weight that a subnet keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ofadiff.reading.arguments import check_argument


@dataclass(frozen=True)
class Slice:
    """The channels of one group along one axis of one module's weights.

    From `start` on, the axis is laid out as `repeats × units × channels`: unit `u` owns, in every repeat `r`, the
    `channels` entries that begin at `start + (r * units + u) * channels`. So whole GroupNorm groups are
    `(1, groups, channels per group)`, GEGLU's two halves `(2, neurons, 1)`, the same offset of every head
    `(heads, head_dim, 1)`.

    Attributes:
        module: Dotted name of the module in the denoiser.
        axis: `"out"` for rows of a linear map, output channels of a convolution and channels of a norm;
            `"in"` for columns or input channels (weight only).
        units: Units of the group.
        channels: Entries per unit in one repeat.
        repeats: How often the layout repeats.
        start: Where on the axis the group begins.
        keeps_softmax_scale: The rows make queries. Attention divides by the root of the *active* head dimension, so
            with k of n units they are multiplied by √(k/n), which leaves the trained softmax scale at every width.
        basis: Name of the matrices that `rotate_attention` may apply to each repeat's units; empty where it may not.
        dual: Those matrices are applied inverted and transposed, so that products with the other side stay.
    """

    module: str
    axis: Literal["out", "in"]
    units: int
    channels: int = 1
    repeats: int = 1
    start: int = 0
    keeps_softmax_scale: bool = False
    basis: str = ""
    dual: bool = False

    @property
    def length(self) -> int:
        """Entries of the axis that belong to the group."""
        return self.repeats * self.units * self.channels

    def indices(self, order: torch.Tensor) -> torch.Tensor:
        """Entries of the axis, relative to `start`, when the units stand in `order`.

        Args:
            order: Units, shape `(units,)`, integer.

        Returns:
            Shape `(length,)`, integer.
        """
        entries = torch.arange(self.length, device=order.device).view(self.repeats, self.units, self.channels)
        return entries[:, order].reshape(-1)

    def per_unit(self, entries: torch.Tensor) -> torch.Tensor:
        """Sums values along the axis over the entries of each unit: `(axis length, …)` to `(units, …)`."""
        own = entries.narrow(0, self.start, self.length)
        return own.unflatten(0, (self.repeats, self.units, self.channels)).sum(dim=(0, 2))


# A slice with the number of units that a subnet keeps of it.
Kept = Sequence[tuple[Slice, int]]

# Sets what a block hard-codes about its width: `resize(block, group, units kept)`.
Resize = Callable[[nn.Module, "ChannelGroup", int], None]


@dataclass
class ChannelGroup:
    """Internal channels that exist together: every slice that one internal width cuts.

    Attributes:
        name: Dotted name of the block whose width this is; unique in the denoiser. Where one block has two widths, the
            second is named behind a colon.
        kind: `"convolution"`, `"self_attention"`, `"cross_attention"`, `"feed_forward"` or `"time_embedding"`.
        stage: The resolution block B of equation 5, such as `"down_blocks.0"`.
        slices: Writers (`"out"`), what is carried along (`"out"`) and readers (`"in"`).
        resize: Sets what the block hard-codes, or None where it hard-codes nothing.
        droppable: A subnet may keep none of the units; of the branch is then left what its readers' biases add.
        basis: Set by `rotate_attention`: the matrices `(heads, head_dim, head_dim)` that took the weights into the
            basis of their singular vectors, by name. The units of a rotated group stand in their final order.
    """

    name: str
    kind: str
    stage: str
    slices: tuple[Slice, ...]
    resize: Resize | None = None
    droppable: bool = False
    basis: dict[str, torch.Tensor] | None = None

    @property
    def block(self) -> str:
        """Dotted name of the block."""
        return self.name.partition(":")[0]

    @property
    def reader(self) -> Slice:
        """The first slice that reads the group's channels."""
        return next(part for part in self.slices if part.axis == "in")

    @property
    def rotatable(self) -> bool:
        """Whether `rotate_attention` may choose the basis of the units."""
        return all(part.basis for part in self.slices)

    @property
    def width(self) -> int:
        """Units of the group."""
        return self.slices[0].units

    @property
    def channels_per_unit(self) -> int:
        """Internal channels of one unit: `width * channels_per_unit` is the full internal width."""
        return self.reader.repeats * self.reader.channels

    def step(self, alignment: int) -> int:
        """Fewest units that make a multiple of `alignment` channels (for a head-dim offset: of the head dimension)."""
        return alignment // math.gcd(alignment, self.reader.channels)


def active_part(tensor: torch.Tensor, parameter: str, kept: Kept) -> torch.Tensor:
    """The part of a module's parameter that a subnet uses; a view where the layout allows one.

    Args:
        tensor: The full parameter.
        parameter: `"weight"` or `"bias"`.
        kept: Slices of the module that are not at full width, each with the units kept.

    Returns:
        The cut parameter, queries scaled as `Slice.keeps_softmax_scale` says.
    """
    if not kept:
        return tensor
    tensor = _cut(tensor, row_axis(tensor.shape), [entry for entry in kept if entry[0].axis == "out"])
    if parameter == "weight":
        tensor = _cut(tensor, 1, [entry for entry in kept if entry[0].axis == "in"])
    return tensor


def row_axis(shape: Sequence[int]) -> int:
    """The axis of a parameter that `"out"` slices cut: the first that is longer than one."""
    longer = [axis for axis, length in enumerate(shape) if length > 1]  # torch.compile of 2.8 knows no `next(…, 0)`
    return longer[0] if longer else 0


def _cut(tensor: torch.Tensor, dim: int, kept: Kept) -> torch.Tensor:
    if not kept:
        return tensor
    pieces = []
    for part, start, length, units in _spans(tensor.shape[dim], kept):
        piece = tensor.narrow(dim, start, length)
        if part is not None:
            if part.repeats > 1:
                piece = piece.unflatten(dim, (part.repeats, part.units * part.channels))
                piece = piece.narrow(dim + 1, 0, units * part.channels).flatten(dim, dim + 1)
            else:
                piece = piece.narrow(dim, 0, units * part.channels)
            piece = _scaled(piece, part, units)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def read_active_part(stored: Any, parameter: str, kept: Kept, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the `active_part` of a parameter that lies in a safetensors file, reading no more than that part.

    Args:
        stored: What `safe_open(…).get_slice(key)` gives.
        parameter: `"weight"` or `"bias"`.
        kept: Slices of the module that are not at full width, each with the units kept.
        dtype: Dtype of the result; queries are scaled in it, as in a model of that dtype.
    """
    shape = stored.get_shape()
    for axis in ("out", "in"):
        on_axis = [entry for entry in kept if entry[0].axis == axis]
        if not on_axis or (axis == "in" and parameter != "weight"):
            continue
        dim = row_axis(shape) if axis == "out" else 1
        pieces = []
        for part, start, length, units in _spans(shape[dim], on_axis):
            if part is None:
                pieces.append(_read(stored, dim, start, length).to(dtype))
                continue
            stride = part.units * part.channels
            for repeat in range(part.repeats):
                piece = _read(stored, dim, start + repeat * stride, units * part.channels).to(dtype)
                pieces.append(_scaled(piece, part, units))
        return torch.cat(pieces, dim)
    return stored[:].to(dtype, copy=True)


def _read(stored: Any, dim: int, start: int, length: int) -> torch.Tensor:
    index = (slice(None),) * dim + (slice(start, start + length),)
    return stored[index]


def _scaled(rows: torch.Tensor, part: Slice, units: int) -> torch.Tensor:
    return rows * math.sqrt(units / part.units) if part.keeps_softmax_scale else rows


def _spans(length: int, kept: Kept) -> Iterator[tuple[Slice | None, int, int, int]]:
    """An axis in order: (slice, start, length, units kept), with None for what no slice in `kept` covers."""
    position = 0
    for part, units in sorted(kept, key=lambda entry: entry[0].start):
        if part.start > position:
            yield None, position, part.start - position, 0
        yield part, part.start, part.length, units
        position = part.start + part.length
    if position < length:
        yield None, position, length - position, 0


def slices_by_module(groups: Sequence[ChannelGroup]) -> dict[str, list[tuple[str, Slice]]]:
    """For every module that some group cuts, its slices, each with the name of its group."""
    found: dict[str, list[tuple[str, Slice]]] = {}
    for group in groups:
        for part in group.slices:
            found.setdefault(part.module, []).append((group.name, part))
    return found


def check_groups(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Raises ValueError if groups are those of another model: it lacks a module that they cut, or has a smaller one."""
    check_argument("model", model, isinstance(model, nn.Module), "a denoiser, a torch.nn.Module")
    listed = isinstance(groups, Sequence) and len(groups) > 0 and all(isinstance(each, ChannelGroup) for each in groups)
    check_argument("groups", groups, listed, "the list of channel groups that find_channel_groups finds in the model")
    modules = dict(model.named_modules())
    for group in groups:
        for part in group.slices:
            if part.module not in modules:
                raise ValueError(
                    f"{group.name} cuts {part.module}, which this {type(model).__name__} does not have; give the "
                    "groups that find_channel_groups finds in it"
                )
            weight = getattr(modules[part.module], "weight", None)
            if not isinstance(weight, torch.Tensor):
                continue
            length = weight.shape[row_axis(weight.shape) if part.axis == "out" else min(1, weight.ndim - 1)]
            if part.start + part.length > length:
                raise ValueError(
                    f"{group.name} cuts {part.start + part.length} entries of {part.module}, which has {length} in "
                    f"this {type(model).__name__}; give the groups that find_channel_groups finds in it"
                )


def check_widths(groups: Sequence[ChannelGroup], widths: dict[str, int]) -> None:
    """Raises ValueError unless `widths` gives every group, and nothing else, between 1 (0: dropped) and all units."""
    names = {group.name for group in groups}
    if names != set(widths):
        missing, unknown = sorted(names - set(widths)), sorted(set(widths) - names)
        raise ValueError(f"widths must name every channel group once: missing {missing}, unknown {unknown}")
    for group in groups:
        least = 0 if group.droppable else 1
        if not least <= widths[group.name] <= group.width:
            raise ValueError(
                f"width of {group.name} is {widths[group.name]} units; it must lie between {least} and {group.width}"
            )


def check_scores(groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless every group has finite scores of shape `(width,)` that are not negative."""
    check_argument("scores", scores, isinstance(scores, Mapping), "a dict of tensors, of the groups by their names")
    for group in groups:
        if group.name not in scores:
            raise ValueError(f"scores lack {group.name}; every channel group needs scores of shape (width,)")
        score = scores[group.name]
        check_argument(f"the score of {group.name}", score, isinstance(score, torch.Tensor), "a tensor")
        if tuple(score.shape) != (group.width,):
            raise ValueError(f"scores of {group.name} have shape {tuple(score.shape)}; it must be ({group.width},)")
        if not torch.isfinite(score).all() or (score < 0).any():
            raise ValueError(f"scores of {group.name} must be finite and not negative, got {score.tolist()}")

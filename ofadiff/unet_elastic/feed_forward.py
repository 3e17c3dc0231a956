"""Channel groups of feed-forwards: what makes the neurons writes, and what gates them, the output projection reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from diffusers.models.attention import FeedForward
from torch import nn

from ofadiff.channels import ChannelGroup, Slice, row_axis
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError

# How many values the projection of a `FeedForward` makes for each neuron: two where one gates the other.
VALUES_PER_NEURON: dict[type[nn.Module], int] = {
    GELU: 1,
    ApproximateGELU: 1,
    LinearActivation: 1,
    GEGLU: 2,
    SwiGLU: 2,
}


def feed_forward_groups(name: str, block: FeedForward, stage: str) -> list[ChannelGroup]:
    """The neuron group of a `FeedForward`; the unit is one neuron.

    Raises:
        UnsupportedBlockError: If the activation is none of `VALUES_PER_NEURON`.
    """
    activation = type(block.net[0])
    if activation not in VALUES_PER_NEURON:
        accepted = ", ".join(known.__name__ for known in VALUES_PER_NEURON)
        raise UnsupportedBlockError(f"its activation {activation.__name__} is none of {accepted}")
    neurons = block.net[2].in_features
    slices = (
        Slice(f"{name}.net.0.proj", "out", neurons, repeats=VALUES_PER_NEURON[activation]),
        Slice(f"{name}.net.2", "in", neurons),
    )
    return [ChannelGroup(name, "feed_forward", stage, slices, droppable=True)]


def neurons(*writers: str, reader: str, kind: str = "feed_forward") -> Callable[..., list[ChannelGroup]]:
    """A finder for feed-forwards that call their layers so.

    Args:
        *writers: Layers that make the neurons, what gates them and what follows them (depthwise convolutions, norms). A
            fused projection makes both halves.
        reader: The layer that reads them.
        kind: Kind of the group; its scores are compared with those of the same kind.
    """
    return partial(_neuron_groups, writers=writers, reader=reader, kind=kind)


def _neuron_groups(
    name: str, block: nn.Module, stage: str, writers: tuple[str, ...], reader: str, kind: str
) -> list[ChannelGroup]:
    if ".experts." in name:
        raise UnsupportedBlockError("a routed expert sees tokens of mixed samples, whose scores cannot be told apart")
    width = block.get_submodule(reader).weight.shape[1]
    slices, depthwise, droppable = [], {}, True
    for writer in writers:
        layer = block.get_submodule(writer)
        shape = next(layer.parameters(recurse=False)).shape
        values = shape[row_axis(shape)] // width
        slices.append(Slice(f"{name}.{writer}", "out", width, repeats=values))
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            depthwise[writer] = values
        droppable &= isinstance(layer, nn.Linear)
    slices.append(Slice(f"{name}.{reader}", "in", width))
    resize = partial(_resize_depthwise, values=depthwise) if depthwise else None
    return [ChannelGroup(name, kind, stage, tuple(slices), resize, droppable)]


def _resize_depthwise(block: nn.Module, group: ChannelGroup, units: int, values: Mapping[str, int]) -> None:
    for layer, values_per_neuron in values.items():
        block.get_submodule(layer).groups = units * values_per_neuron

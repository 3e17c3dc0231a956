"""Channel groups of `FeedForward`: the input projection writes (a gated one both halves), the output reads."""

from __future__ import annotations

from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from diffusers.models.attention import FeedForward
from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError

# How many values the projection makes for each neuron: two where one gates the other.
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
    return [ChannelGroup(name, "feed_forward", stage, slices)]

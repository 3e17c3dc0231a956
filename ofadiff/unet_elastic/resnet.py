"""Channel groups of residual convolution blocks: `conv1` writes, `norm2` and time embedding follow, `conv2` reads."""

from __future__ import annotations

from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

from ofadiff.channels import ChannelGroup, Slice


def resnet_groups(name: str, block: ResnetBlock2D, stage: str) -> list[ChannelGroup]:
    """The convolution group of a `ResnetBlock2D`; the unit is one whole group of `norm2`."""
    units = block.norm2.num_groups
    channels = block.conv1.out_channels // units
    slices = [
        Slice(f"{name}.conv1", "out", units, channels),
        Slice(f"{name}.norm2", "out", units, channels),
        Slice(f"{name}.conv2", "in", units, channels),
    ]
    if block.time_emb_proj is not None:
        # scale_shift: the projection makes a scale and a shift for every channel, one half after the other.
        repeats = block.time_emb_proj.out_features // block.conv1.out_channels
        slices.append(Slice(f"{name}.time_emb_proj", "out", units, channels, repeats))
    return [ChannelGroup(name, "convolution", stage, tuple(slices))]


def condition_norm_resnet_groups(name: str, block: ResnetBlockCondNorm2D, stage: str) -> list[ChannelGroup]:
    """The convolution group of a `ResnetBlockCondNorm2D`, whose `norm2` is an `AdaGroupNorm` or a `SpatialNorm`."""
    adaptive = isinstance(block.norm2, AdaGroupNorm)
    units = block.norm2.num_groups if adaptive else block.norm2.norm_layer.num_groups
    channels = block.conv1.out_channels // units
    slices = [Slice(f"{name}.conv1", "out", units, channels), Slice(f"{name}.conv2", "in", units, channels)]
    if adaptive:
        slices.append(Slice(f"{name}.norm2.linear", "out", units, channels, repeats=2))
        return [ChannelGroup(name, "convolution", stage, tuple(slices), resize=_resize_adaptive_norm)]
    for part in ("norm_layer", "conv_y", "conv_b"):
        slices.append(Slice(f"{name}.norm2.{part}", "out", units, channels))
    return [ChannelGroup(name, "convolution", stage, tuple(slices))]


def _resize_adaptive_norm(block: nn.Module, group: ChannelGroup, units: int) -> None:
    block.norm2.num_groups = units

"""Channel groups of residual convolution blocks: `conv1` writes, `norm2` and time embedding follow, `conv2` reads."""

from __future__ import annotations

from dataclasses import replace

from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

from ofadiff.channels import ChannelGroup, Slice


def resnet_groups(name: str, block: ResnetBlock2D, stage: str) -> list[ChannelGroup]:
    """The convolution group of a `ResnetBlock2D` or a block like it; the unit is one whole group of `norm2`."""
    units = block.norm2.num_groups
    channels = block.norm2.num_channels // units
    slices = [
        Slice(f"{name}.conv1", "out", units, channels),
        Slice(f"{name}.norm2", "out", units, channels),
        Slice(f"{name}.conv2", "in", units, channels),
    ]
    resize = None
    separable = not isinstance(block.conv1, (nn.Conv2d, nn.Conv3d))
    if separable:
        # Separable convolutions: channels are mixed by the pointwise halves, the second depthwise half follows them.
        slices[0] = Slice(f"{name}.conv1.pointwise", "out", units, channels)
        slices[2] = Slice(f"{name}.conv2.pointwise", "in", units, channels)
        slices.append(Slice(f"{name}.conv2.depthwise", "out", units, channels))
        resize = _resize_depthwise
    if block.time_emb_proj is not None:
        # scale_shift: the projection makes a scale and a shift for every channel, one half after the other.
        repeats = block.time_emb_proj.out_features // block.norm2.num_channels
        slices.append(Slice(f"{name}.time_emb_proj", "out", units, channels, repeats))
    return [ChannelGroup(name, "convolution", stage, tuple(slices), resize, droppable=not separable)]


def _resize_depthwise(block: nn.Module, group: ChannelGroup, units: int) -> None:
    block.conv2.depthwise.groups = units * group.channels_per_unit


def temporal_convolution_groups(name: str, block: nn.Module, stage: str) -> list[ChannelGroup]:
    """The convolution groups of a `TemporalConvLayer`: within its first and within its second pair of convolutions."""

    def pair(first: str, second: str) -> ChannelGroup:
        last = {part: f"{part}.{len(block.get_submodule(part)) - 1}" for part in (first, second)}
        return _pair(name, block, stage, last[first], f"{second}.0", last[second])

    return [pair("conv1", "conv2"), pair("conv3", "conv4")]


def kandinsky3_groups(name: str, block: nn.Module, stage: str) -> list[ChannelGroup]:
    """The convolution groups of a `Kandinsky3ResNetBlock`: within its two pairs of convolutions.

    A pair that resamples in between has none.
    """
    groups = []
    for first, second in ((0, 1), (2, 3)):
        writer, reader = block.resnet_blocks[first], block.resnet_blocks[second]
        if isinstance(writer.down_sample, nn.Identity) and isinstance(reader.up_sample, nn.Identity):
            norm, layer = f"resnet_blocks.{second}.group_norm", "resnet_blocks.{}.projection"
            pair = _pair(name, block, stage, layer.format(first), f"{norm}.norm", layer.format(second))
            scale_shift = Slice(f"{name}.{norm}.context_mlp.1", "out", pair.width, pair.channels_per_unit, repeats=2)
            groups.append(replace(pair, slices=(*pair.slices, scale_shift)))
    return groups


def _pair(name: str, block: nn.Module, stage: str, writer: str, norm: str, reader: str) -> ChannelGroup:
    """The channels between two convolutions with a group norm in between; the unit is one whole group of it."""
    layer = block.get_submodule(norm)
    units, channels = layer.num_groups, layer.num_channels // layer.num_groups
    slices = (
        Slice(f"{name}.{writer}", "out", units, channels),
        Slice(f"{name}.{norm}", "out", units, channels),
        Slice(f"{name}.{reader}", "in", units, channels),
    )
    return ChannelGroup(f"{name}:{writer}", "convolution", stage, slices, droppable=True)


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

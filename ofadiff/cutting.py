"""What is done to a whole denoiser's groups: order their units, make the layers elastic, set or cut their widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ofadiff.basis.change import change_module
from ofadiff.channels import ChannelGroup, Kept, slices_by_module
from ofadiff.layers import ELASTIC, check_elastic_type, make_elastic, shrink


def permute_units(model: nn.Module, group: ChannelGroup, order: torch.Tensor) -> None:
    """Puts the units of a group in `order`, in place; the full-size model computes the same function as before.

    Args:
        model: The denoiser.
        group: One of its groups.
        order: Unit that comes first, second, …; shape `(group.width,)`, integer, a permutation.
    """
    for part in group.slices:
        change_module(model.get_submodule(part.module), part, order)


def make_model_elastic(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Gives every layer that some group cuts its elastic class, in place.

    Raises:
        ValueError: If the model has elastic layers, adapters or hooks already; nothing is changed then.
        TypeError: If there is no elastic class for a layer's type; nothing is changed then.
    """
    elastic = tuple(ELASTIC.values())
    for name, module in model.named_modules():
        if isinstance(module, elastic):
            raise ValueError(f"{name} is elastic already; a model belongs to one Supernet")
        if name.rpartition(".")[2] == "lora_A":
            raise ValueError(f"{name} is part of an adapter; merge or unload adapters before compressing")
    layers = {name: model.get_submodule(name) for name in slices_by_module(groups)}
    for name, layer in layers.items():
        check_can_be_elastic(layer, name)
    for group in groups:
        if group.droppable and group.resize is not None:
            check_has_no_hook(model.get_submodule(group.block), group.block)
    for name, layer in layers.items():
        make_elastic(layer, name)


def check_can_be_elastic(layer: nn.Module, name: str) -> None:
    """Raises TypeError if there is no elastic class for a layer's type, ValueError if the layer has a hook already."""
    check_elastic_type(layer, name)
    check_has_no_hook(layer, name)


def check_has_no_hook(module: nn.Module, name: str) -> None:
    """Raises ValueError if a hook stands in the place of a module's forward."""
    if "forward" in vars(module):
        # The hook would go on calling the stock class's forward, at full size.
        raise ValueError(
            f"{name} has a hook in place of its forward (a cache, offloading, casting); add it after the Supernet"
        )


def kept_by_module(groups: Sequence[ChannelGroup], widths: dict[str, int]) -> dict[str, Kept]:
    """For every module that some group cuts, its slices that are not at full width, each with the units kept."""
    return {
        module: tuple((part, widths[group]) for group, part in parts if widths[group] < part.units)
        for module, parts in slices_by_module(groups).items()
    }


def set_widths(model: nn.Module, groups: Sequence[ChannelGroup], widths: dict[str, int]) -> None:
    """Sets an elastic model to the given units per group."""
    for name, kept in kept_by_module(groups, widths).items():
        model.get_submodule(name).kept = kept
    _resize_blocks(model, groups, widths)


def shrink_model(model: nn.Module, groups: Sequence[ChannelGroup], widths: dict[str, int]) -> None:
    """Cuts a stock model, in place, down to the given units per group: a smaller stock model."""
    for name, kept in kept_by_module(groups, widths).items():
        shrink(model.get_submodule(name), name, kept)
    _resize_blocks(model, groups, widths)


def _resize_blocks(model: nn.Module, groups: Sequence[ChannelGroup], widths: dict[str, int]) -> None:
    for group in groups:
        if group.resize is not None:
            group.resize(model.get_submodule(group.block), group, widths[group.name])

"""LoRA adapters of the original model on a supernet or an extracted model.

An adapter adds B A to a weight W. Where W's rows were sorted, rotated and cut, B's rows have to be; where its columns
were, A's columns. Then the adapted subnet is the subnet of the adapted original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ofadiff.basis.change import apply_change, change_module, change_of_basis
from ofadiff.channels import ChannelGroup, Kept, Slice, active_part, slices_by_module
from ofadiff.layers import ELASTIC, make_elastic

# One side of an adapter's layer, with the slice that cuts it and the name of the slice's group.
Side = tuple[nn.Module, str, Slice]


def check_adapter(model: nn.Module, groups: Sequence[ChannelGroup], adapter: str) -> None:
    """Raises ValueError if an adapter changes a cut layer in a way that cannot follow it, naming the layer."""
    for name in slices_by_module(groups):
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            if adapter in layer.lora_magnitude_vector:
                raise ValueError(f"the adapter {adapter!r} uses DoRA at {name}; only plain LoRA can follow the sizes")
        elif not isinstance(layer, tuple(ELASTIC.values())):
            raise ValueError(f"{name} is adapted by a {type(layer).__name__}; only LoRA can follow the sizes")


def adopt_adapter(
    model: nn.Module, groups: Sequence[ChannelGroup], adapter: str, basis: Mapping[str, torch.Tensor]
) -> list[Side]:
    """Makes the layers of an injected adapter of the original model elastic, in place.

    Args:
        model: The elastic denoiser, with the adapter injected by peft at full size.
        groups: Its channel groups.
        adapter: Name of the adapter.
        basis: The supernet's; the adapter's weights are taken there.

    Returns:
        Every side that follows a group's width, with the slice that says how.

    Raises:
        ValueError: If the adapter is no plain LoRA; nothing is changed then.
    """
    check_adapter(model, groups, adapter)
    sides = []
    for name, parts in slices_by_module(groups).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        for group, part in parts:
            side = layer.lora_B[adapter] if part.axis == "out" else layer.lora_A[adapter]
            # The weights may be the caller's own tensors, and a layer may have two parts.
            side.weight.data = side.weight.data.clone()
            change_module(side, part, change_of_basis(group, part, basis))
            if not isinstance(side, tuple(ELASTIC.values())):
                make_elastic(side, f"{name}, adapter {adapter}")
            sides.append((side, group, part))
    return sides


def convert_lora_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    basis: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """An adapter of the original model, for an extracted one.

    Args:
        state_dict: In peft's format: `<module>.lora_A.weight`, `<module>.lora_B.weight`, at full size.
        groups: Channel groups of the full-size model.
        widths: Units that the extracted model keeps.
        basis: The supernet's.

    Returns:
        The same keys, in the basis of the supernet and cut.

    Raises:
        ValueError: If a layer that is cut is adapted by something other than plain LoRA.
    """
    converted = dict(state_dict)
    parts = slices_by_module(groups)
    for key, tensor in state_dict.items():
        if ".dora_scale" in key or ".lora_magnitude_vector" in key:
            raise ValueError(f"the adapter uses DoRA, {key!r}; only plain LoRA can follow the sizes")
        side = next((side for side in (".lora_A.", ".lora_B.") if side in key), None)
        module = key.partition(side or ".lora")[0]
        if side is None:
            if any(key.startswith(f"{name}.") for name in parts):
                raise ValueError(f"the adapter has {key!r}; only plain LoRA can follow the sizes")
            continue
        parameter = key.rpartition(".")[2]
        for group, part in parts.get(module, []):
            if (part.axis == "out") == (side == ".lora_B."):
                dim = 0 if part.axis == "out" else 1
                if tensor.shape[dim] < part.start + part.length:
                    raise ValueError(
                        f"the adapter's {key} has shape {tuple(tensor.shape)}, but the original's layer has at least "
                        f"{part.start + part.length} channels there; a LoRA that was trained on an extracted size acts "
                        "there alone, by peft's own functions"
                    )
                tensor = apply_change(tensor, dim, part, change_of_basis(group, part, basis))
                kept: Kept = ((part, widths[group]),) if widths[group] < part.units else ()
                tensor = active_part(tensor, parameter, kept)
        converted[key] = tensor.contiguous()
    return converted

"""What a denoiser costs: parameters, MACs counted on a real forward, and the time that one takes on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ofadiff.channels import ChannelGroup, row_axis
from ofadiff.denoisers.inputs import Inputs, batch_of, forward_inputs
from ofadiff.denoisers.zeros import NoInputsError
from ofadiff.reading.stumbles import in_one_sentence


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Inputs | None = None) -> int:
    """Multiply-accumulate operations of one forward, as PyTorch's own FLOP counter sees them (a MAC is two FLOPs).

    Nothing is computed where the model lets the forward run on the meta device.

    Args:
        model: The denoiser, elastic (counted at its current size) or not.
        inputs: Keyword arguments of the forward, or recordings of the model, whose first call is counted for one sample
            of its batch; by default `example_inputs(model)`, a batch of one.
    """
    arguments = forward_inputs(model, inputs)
    return _counted_forward(model, arguments).get_total_flops() // 2 // batch_of(arguments)


@dataclass(frozen=True)
class UnitCosts:
    """How costs grow with widths: linearly, since every weight is cut by one group along one axis.

    Attributes:
        params: Parameters at full size.
        macs: MACs of one forward at full size; None if nothing says what the model is called with.
        unit_params: Parameters that one unit of each group owns.
        unit_macs: MACs that one unit of each group takes; none if they could not be counted.
    """

    params: int
    macs: int | None
    unit_params: dict[str, int]
    unit_macs: dict[str, int]


def unit_costs(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Inputs | None = None) -> UnitCosts:
    """Costs of the full denoiser and of one unit of each group, from one counted forward.

    Args:
        model: The denoiser, not elastic yet or at full size.
        groups: Its channel groups.
        inputs: Keyword arguments of the forward, or recordings of the model; by default `example_inputs(model)`.
            Without any for its class, MACs are not counted.

    Raises:
        ValueError: If a module is cut on both axes, so that costs are no sum over groups.
    """
    params = unit_parameters(model, groups)
    try:
        arguments = forward_inputs(model, inputs)
        counter, batch = _counted_forward(model, arguments), batch_of(arguments)
    except NoInputsError:
        return UnitCosts(count_parameters(model), None, params, {})
    flops = {name: sum(per_op.values()) for name, per_op in counter.get_flop_counts().items()}
    root = type(model).__name__
    unit_macs: dict[str, int] = {}
    for group in groups:
        # What the block computes outside its children: the two products of an attention.
        own = _own_flops(flops, f"{root}.{group.block}") if group.kind.endswith("attention") else 0
        if all(part.basis == "value_output" for part in group.slices):
            own //= 2  # queries and keys, and their product, stay
        macs = own // 2 // batch // group.width
        for part in group.slices:
            if f"{root}.{part.module}" in flops:
                length = model.get_submodule(part.module).weight.shape[0 if part.axis == "out" else 1]
                macs += flops[f"{root}.{part.module}"] // 2 // batch * part.repeats * part.channels // length
        unit_macs[group.name] = macs
    return UnitCosts(count_parameters(model), counter.get_total_flops() // 2 // batch, params, unit_macs)


def unit_parameters(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """Parameters that one unit of each group owns.

    Raises:
        ValueError: If a module is cut on both axes, so that costs are no sum over groups.
    """
    cut_axes: dict[str, str] = {}
    owned: dict[str, int] = {}
    for group in groups:
        owned[group.name] = 0
        for part in group.slices:
            if cut_axes.setdefault(part.module, part.axis) != part.axis:
                raise ValueError(f"{part.module} is cut on both axes, so its cost is no sum over channel groups")
            for name, parameter in model.get_submodule(part.module).named_parameters(recurse=False):
                if part.axis == "out" or name == "weight":
                    length = parameter.shape[row_axis(parameter.shape) if part.axis == "out" else 1]
                    owned[group.name] += parameter.numel() // length * part.repeats * part.channels
    return owned


def _own_flops(flops: Mapping[str, int], block: str) -> int:
    """FLOPs of a block less those of the modules inside it that the counter saw."""
    children = 0
    outermost: list[str] = []
    for name in sorted(name for name in flops if name.startswith(f"{block}.")):
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
            children += flops[name]
    return flops.get(block, 0) - children


def _counted_forward(model: nn.Module, inputs: Mapping[str, Any]) -> FlopCounterMode:
    with in_one_sentence(f"the inputs are none that the forward of {type(model).__name__} takes"):
        return _counted(model, inputs)


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> FlopCounterMode:
    tensors = [*model.parameters(), *model.buffers()]
    # A copy without weights: some models keep what they computed in a forward for the next one.
    on_meta = copy.deepcopy(model, {id(tensor): tensor.detach().to("meta") for tensor in tensors})
    try:
        return _count(on_meta, _to_meta(dict(inputs)))
    except (NotImplementedError, RuntimeError) as error:
        # A model that looks at the values of its inputs, such as the lengths of the prompts, has to compute.
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NoInputsError(f"a {type(model).__name__} can be counted with its weights only") from error
        return _count(model, inputs)


def _count(model: nn.Module, inputs: Mapping[str, Any]) -> FlopCounterMode:
    # The fused attention kernels have no FLOP formula on every device; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter


def _to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_meta(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(entry) for entry in value)
    return value.to("meta") if isinstance(value, torch.Tensor) else value

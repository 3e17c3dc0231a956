"""What a denoiser costs: parameters, and MACs counted on a real forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ofadiff.channels import ChannelGroup, row_axis

TEXT_TOKENS = 77


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulate operations of one forward, as PyTorch's own FLOP counter sees them (a MAC is two FLOPs).

    Nothing is computed: the forward runs on the meta device.

    Args:
        model: The denoiser, elastic (counted at its current size) or not.
        inputs: Keyword arguments of the forward; by default `example_inputs(model)`, a batch of one.
    """
    return _counted_forward(model, inputs).get_total_flops() // 2


def example_inputs(model: nn.Module, batch_size: int = 1) -> dict[str, Any]:
    """Keyword arguments for one forward at the sample size of the model's config, on its device, in its dtype.

    Raises:
        ValueError: If the model's class is none that inputs are known for, or its config has no sample size.
    """
    for known, make in INPUTS.items():
        if isinstance(model, known):
            return make(model, batch_size)
    accepted = ", ".join(known.__name__ for known in INPUTS)
    raise ValueError(f"no example inputs are known for {type(model).__name__}, only for {accepted}; pass inputs")


@dataclass(frozen=True)
class UnitCosts:
    """How costs grow with widths: linearly, since every weight is cut by one group along one axis.

    Attributes:
        params: Parameters at full size.
        macs: MACs of one forward at full size.
        unit_params: Parameters that one unit of each group owns.
        unit_macs: MACs that one unit of each group takes.
    """

    params: int
    macs: int
    unit_params: dict[str, int]
    unit_macs: dict[str, int]


def unit_costs(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Mapping[str, Any] | None = None) -> UnitCosts:
    """Costs of the full denoiser and of one unit of each group, from one counted forward.

    Args:
        model: The denoiser, not elastic yet or at full size.
        groups: Its channel groups.
        inputs: Keyword arguments of the forward; by default `example_inputs(model)`.

    Raises:
        ValueError: If a module is cut on both axes, so that costs are no sum over groups.
    """
    counter = _counted_forward(model, inputs)
    flops = {name: sum(per_op.values()) for name, per_op in counter.get_flop_counts().items()}
    root = type(model).__name__
    cut_axes: dict[str, str] = {}
    unit_params: dict[str, int] = {}
    unit_macs: dict[str, int] = {}
    for group in groups:
        # What the block computes outside its children: the two products of an attention.
        own = _own_flops(flops, f"{root}.{group.block}") if group.kind.endswith("attention") else 0
        params, macs = 0, own // 2 // group.width
        for part in group.slices:
            if cut_axes.setdefault(part.module, part.axis) != part.axis:
                raise ValueError(f"{part.module} is cut on both axes, so its cost is no sum over channel groups")
            module = model.get_submodule(part.module)
            for name, parameter in module.named_parameters(recurse=False):
                if part.axis == "out" or name == "weight":
                    length = parameter.shape[row_axis(parameter.shape) if part.axis == "out" else 1]
                    params += parameter.numel() // length * part.repeats * part.channels
            if f"{root}.{part.module}" in flops:
                length = module.weight.shape[0 if part.axis == "out" else 1]
                macs += flops[f"{root}.{part.module}"] // 2 * part.repeats * part.channels // length
        unit_params[group.name], unit_macs[group.name] = params, macs
    return UnitCosts(count_parameters(model), counter.get_total_flops() // 2, unit_params, unit_macs)


def _own_flops(flops: Mapping[str, int], block: str) -> int:
    """FLOPs of a block less those of the modules inside it that the counter saw."""
    children = 0
    outermost: list[str] = []
    for name in sorted(name for name in flops if name.startswith(f"{block}.")):
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
            children += flops[name]
    return flops.get(block, 0) - children


def _counted_forward(model: nn.Module, inputs: Mapping[str, Any] | None) -> FlopCounterMode:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    inputs = _to_meta(dict(example_inputs(model) if inputs is None else inputs))
    # The fused attention kernels have no FLOP formula on every device; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, on_meta, kwargs=inputs)
    return counter


def _to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_meta(entry) for key, entry in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _unet_2d_inputs(model: UNet2DModel, batch_size: int) -> dict[str, Any]:
    device, dtype = model.device, model.dtype
    inputs = {
        "sample": torch.zeros(batch_size, model.config.in_channels, *_sample_size(model), device=device, dtype=dtype),
        "timestep": torch.zeros(batch_size, device=device, dtype=torch.long),
    }
    if model.config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(batch_size, device=device, dtype=torch.long)
    return inputs


def _unet_2d_condition_inputs(model: UNet2DConditionModel, batch_size: int) -> dict[str, Any]:
    config, device, dtype = model.config, model.device, model.dtype
    text_width = config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(text_width, (tuple, list)):
        text_width = text_width[0]
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch_size, config.in_channels, *_sample_size(model), device=device, dtype=dtype),
        "timestep": torch.zeros(batch_size, device=device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch_size, TEXT_TOKENS, text_width, device=device, dtype=dtype),
    }
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(batch_size, device=device, dtype=torch.long)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch_size, pooled, device=device, dtype=dtype),
            "time_ids": torch.zeros(batch_size, 6, device=device, dtype=dtype),
        }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.zeros(batch_size, config.time_cond_proj_dim, device=device, dtype=dtype)
    return inputs


def _sample_size(model: nn.Module) -> tuple[int, int]:
    size = model.config.sample_size
    if size is None:
        raise ValueError(f"the config of this {type(model).__name__} has no sample_size; pass inputs")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# A new kind of denoiser is one function and one line here.
INPUTS: dict[type[nn.Module], Callable[..., dict[str, Any]]] = {
    UNet2DModel: _unet_2d_inputs,
    UNet2DConditionModel: _unet_2d_condition_inputs,
}

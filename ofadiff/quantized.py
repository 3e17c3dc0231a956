"""Weights that torchao has quantized: how they are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ofadiff.channels import Kept, active_part

# What weights are that nothing has quantized.
PLAIN = (torch.Tensor, nn.Parameter)

# The kind that can be cut.
INT8 = "Int8Tensor"


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a tensor of torchao's."""
    # The first makes no graph break where a compiled model cuts its weights.
    return type(tensor) not in PLAIN and type(tensor).__module__.partition(".")[0] == "torchao"


def check_not_quantized(model: nn.Module, what: str) -> None:
    """Raises ValueError if torchao has quantized weights of a model, naming what is to be done before that."""
    name = next((name for name, parameter in model.named_parameters() if is_quantized(parameter)), None)
    if name is not None:
        raise ValueError(f"the model's {name} is quantized, a {type(model.get_parameter(name)).__name__}; {what}")


def active_parameter(tensor: torch.Tensor, parameter: str, kept: Kept) -> torch.Tensor:
    """The `active_part` of a parameter that may be quantized.

    int8 weights with one scale per row keep the integers and the scales of what is left: a scale holds for every number
    of columns. With the channels of a query, its scales are multiplied.

    Raises:
        ValueError: If the parameter is quantized in another way.
    """
    return _int8_part(tensor, kept) if kept and is_quantized(tensor) else active_part(tensor, parameter, kept)


def storage_of(parameter: Any) -> torch.Tensor:
    """The tensor that a parameter's values lie in: of a quantized one, its integers."""
    return parameter.qdata if type(parameter).__name__ == INT8 else parameter


def _int8_part(tensor: Any, kept: Kept) -> torch.Tensor:
    _check_can_be_cut(tensor)
    unscaled = [(replace(part, keeps_softmax_scale=False), units) for part, units in kept]
    names, context = tensor.__tensor_flatten__()
    parts = {name: active_part(getattr(tensor, name), "bias", unscaled) for name in names}
    parts["scale"] = active_part(tensor.scale, "bias", kept)
    parts["qdata"] = active_part(tensor.qdata, "weight", unscaled).contiguous()
    if 0 in parts["qdata"].shape:  # torchao multiplies nothing by it
        return parts["qdata"].to(tensor.dtype)
    part = type(tensor).__tensor_unflatten__(parts, context, None, None)
    part.block_size = [1, part.shape[1]]
    return part


def _check_can_be_cut(tensor: Any) -> None:
    by_row = (
        type(tensor).__name__ == INT8
        and tensor.scale.shape == (tensor.shape[0], 1)
        and tensor.act_pre_scale is None
        and tensor.act_quant_scale is None
    )
    if not by_row:
        scales = f" with scales of shape {tuple(tensor.scale.shape)}" if type(tensor).__name__ == INT8 else ""
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} is quantized to a {type(tensor).__name__}{scales}; the sizes of "
            f"a supernet follow an {INT8} with one scale per row, as Int8WeightOnlyConfig() makes it; for another, "
            "quantize extract(size)"
        )

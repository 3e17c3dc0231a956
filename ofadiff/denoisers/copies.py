"""Frozen copies of models in another precision."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from diffusers import ModelMixin
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def copy_in(model: Model, dtype: torch.dtype) -> Model:
    """A copy of a model in a precision, parameter by parameter: at no time is there a second one in the old precision.

    Modules that diffusers keeps in float32 stay in it.

    Args:
        model: Unchanged.
        dtype: Dtype of the copy's floating-point parameters and buffers.
    """
    kept = (model._keep_in_fp32_modules or []) if isinstance(model, ModelMixin) else []
    copies: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        of_its_own = torch.float32 if set(name.split(".")) & set(kept) else dtype
        cast = _cast(parameter, of_its_own)
        copies[id(parameter)] = nn.Parameter(cast, requires_grad=parameter.requires_grad and cast.is_floating_point())
    for buffer in model.buffers():
        copies[id(buffer)] = _cast(buffer, dtype)
    return copy.deepcopy(model, copies)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

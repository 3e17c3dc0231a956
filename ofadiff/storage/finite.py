"""What is not finite: the error that says so, and a look at weights before anything is made of them."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class NotFiniteError(RuntimeError):
    """A model gave values that are not finite, or a number came of them that is not."""


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Raises ValueError for a model with weights that are not finite: names the first one. Quantized ones pass.

    Args:
        model: Anything with weights; those on the meta device pass.
        name: What to call it.
    """
    for key, tensor in model.state_dict().items():
        if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_floating_point():
            continue
        # There is no such question of numbers of one byte.
        finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)
        if not finite.all():
            count, dtype = tensor.numel() - int(finite.sum()), tensor.dtype
            raise ValueError(
                f"{name} has weights that are not finite: {count} of the {tensor.numel()} in {key}; expected numbers, "
                f"of {str(dtype).removeprefix('torch.')} up to {torch.finfo(dtype).max:g}"
            )


def check_finite_pipeline(pipeline: DiffusionPipeline, name: str) -> None:
    """Raises ValueError for a pipeline with a model whose weights are not finite: names it and the first one."""
    for component, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            check_finite_weights(model, f"the {component} of {name}")

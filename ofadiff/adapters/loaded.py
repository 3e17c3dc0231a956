"""Which LoRAs a model has, and loading one where weights may be offloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def loaded_adapters(model: Any) -> tuple[str, ...]:
    """Names of the adapters that peft has put into a model."""
    return tuple(vars(model).get("peft_config") or ())  # peft gives a model this with its first adapter


def is_adapted(model: Any) -> bool:
    """Whether a model has weights of adapters."""
    return any("lora_" in name for name in model.state_dict())


def check_is_lora(state_dict: Mapping[str, torch.Tensor], prefix: str | None) -> None:
    """Raises ValueError if an adapter has weights for the denoiser that are no LoRA's, naming one."""
    for key in state_dict:
        if (prefix is None or key.startswith(f"{prefix}.")) and not ("lora" in key or key.endswith(("alpha", "scale"))):
            raise ValueError(f"the adapter has {key!r}; only plain LoRA can follow the sizes")


@contextmanager
def without_offloading(model: Any, pipeline: Any) -> Iterator[None]:
    """A block in which a pipeline's weights are not offloaded: a hook would go on calling a layer as it was."""
    model_offload, sequential_offload, *group_offload = model._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif any(group_offload):
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            _maybe_remove_and_reapply_group_offloading(model)

"""What tells weights from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


@torch.no_grad()
def digest_of_weights(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """What tells a model's weights from any others.

    Args:
        model: The model.
        dtype: Compare its floating-point weights as they are in this dtype; by default each in its own.

    Raises:
        ValueError: If weights are on the meta device.
    """
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} of this {type(model).__name__} is on the meta device, as sequential offloading leaves it; "
                "load the model as it is, or offload whole models (enable_model_cpu_offload)"
            )
    return digest_of_tensors(tensors, dtype)


@torch.no_grad()
def digest_of_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    """What tells named tensors from any others; of floating-point ones as they are in a dtype."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        tensor = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return f"SHA-256 {digest.hexdigest()}"

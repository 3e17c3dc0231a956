"""What tells weights from others."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def digest_of_weights(model: nn.Module) -> str:
    """What tells a model's weights from any others."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return f"SHA-256 {digest.hexdigest()}"

"""Floating-point types by name."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# As accelerate calls mixed precision.
PRECISIONS = {"no": DTYPES["float32"], "fp16": DTYPES["float16"], "bf16": DTYPES["bfloat16"]}


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `"float32"`."""
    return str(dtype).removeprefix("torch.")

"""Floating-point types by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# As accelerate calls mixed precision.
PRECISIONS = {"no": DTYPES["float32"], "fp16": DTYPES["float16"], "bf16": DTYPES["bfloat16"]}


@contextmanager
def torch_dtype_taken() -> Iterator[None]:
    """A block in which diffusers loads in a `torch_dtype`: the only name for it that all of its versions take."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        yield


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `"float32"`."""
    return str(dtype).removeprefix("torch.")

"""Nested values as JSON and tensors: what a forward was called with, to be kept in a safetensors file.

A tensor is kept under the digest of its content, so what several calls share is kept once. Its dtype and the order of
its dimensions in memory come back as they were, and what was expanded is kept once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Spec = Any
Tensors = dict[str, Tensor]

DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


# What an expanded tensor may take where it is copied.
MOST_BYTES = 2**34


class UnrecordableError(ValueError):
    """A value that cannot be kept in a file."""


def to_spec(value: Any, tensors: Tensors, where: str) -> Spec:
    """A value as JSON; its tensors are added to others, on the CPU.

    Args:
        value: Tensors, arrays, numbers, strings, dtypes, None, and lists, tuples and dicts of such.
        tensors: By the digest of their content.
        where: What the value is called, for the error.

    Raises:
        UnrecordableError: If it holds anything else; names it.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return _tensor_spec(value.detach(), tensors)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return {"array": _tensor_spec(torch.from_numpy(np.array(value)), tensors)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if type(value) in (list, tuple):
        entries = [to_spec(entry, tensors, f"{where}[{number}]") for number, entry in enumerate(value)]
        return {type(value).__name__: entries}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        entries = [[key, to_spec(entry, tensors, f"{where}[{key!r}]")] for key, entry in value.items()]
        return {"dict": entries}
    raise UnrecordableError(
        f"{where} is a {type(value).__name__}, which cannot be recorded; tensors, arrays, numbers, strings, dtypes, "
        "and lists, tuples and dicts of such can"
    )


def from_spec(spec: Spec, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `to_spec` described.

    Raises:
        ValueError: If the description is none.
        KeyError: If a tensor of it is missing.
    """
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "tensor":
        return _tensor(content, tensors)
    if kind == "array":
        return _tensor(content["tensor"], tensors).numpy()[()]
    if kind in ("list", "tuple"):
        entries = [from_spec(entry, tensors) for entry in content]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict":
        return {key: from_spec(entry, tensors) for key, entry in content}
    if kind == "float":
        return float(content)
    if kind == "size":
        return torch.Size(content)
    if kind == "dtype":
        return DTYPES[content]
    raise ValueError(f"a recorded value is of the kind {kind!r}, which this ofadiff does not know")


def tensor_names(spec: Spec) -> set[str]:
    """The digests of all tensors of a description."""
    if isinstance(spec, dict):
        if "tensor" in spec:
            return {spec["tensor"]["name"]}
        return set().union(*map(tensor_names, spec.values()))
    return set().union(*map(tensor_names, spec)) if isinstance(spec, list) else set()


def _tensor_spec(tensor: Tensor, tensors: Tensors) -> Spec:
    spec: dict[str, Any] = {}
    if tensor.is_complex():
        tensor, spec["complex"] = torch.view_as_real(tensor.resolve_conj()), True
    shape = tuple(tensor.shape)
    repeated = [size > 1 and stride == 0 for size, stride in zip(shape, tensor.stride(), strict=True)]
    narrow = tensor[tuple(slice(1) if again else slice(None) for again in repeated)]
    if tuple(narrow.shape) != shape:
        spec["expand"] = list(shape)
    if not narrow.is_contiguous():
        order = sorted(range(narrow.ndim), key=lambda dim: -narrow.stride(dim))
        if order != list(range(narrow.ndim)):
            spec["order"], narrow = order, narrow.permute(order)
    kept = torch.empty(narrow.shape, dtype=narrow.dtype).copy_(narrow)
    name = digest_of(kept)
    tensors.setdefault(name, kept)
    return {"tensor": {"name": name, **spec}}


def digest_of(kept: Tensor) -> str:
    """The name that a contiguous tensor on the CPU is kept under: the digest of its content."""
    digest = hashlib.sha256(f"{kept.dtype} {tuple(kept.shape)}".encode())
    digest.update(kept.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _tensor(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[spec["name"]]
    if "order" in spec:
        inverse = [spec["order"].index(dim) for dim in range(tensor.ndim)]
        tensor = tensor.permute(inverse)
    if "expand" in spec:
        tensor = tensor.expand(spec["expand"])
        if tensor.numel() * tensor.itemsize > MOST_BYTES:
            raise ValueError(
                f"a recorded tensor claims the shape {tuple(tensor.shape)}, more than {MOST_BYTES:,} bytes"
            )
    return torch.view_as_complex(tensor) if spec.get("complex") else tensor


def map_tensors(function: Any, value: Any) -> Any:
    """A nested value with every tensor replaced by what a function makes of it."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, entry) for entry in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    return value

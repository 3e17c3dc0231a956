"""Reads one size out of a supernet's files, and no more of them than that size keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin

from ofadiff.adapters.size_adapter import load_size_adapter
from ofadiff.basis.change import load_basis
from ofadiff.channels import Kept, read_active_part
from ofadiff.cutting import kept_by_module
from ofadiff.extraction.extracted_model import empty_extracted_model, groups_of
from ofadiff.reading.tensors import open_tensors
from ofadiff.sizes import Subnet
from ofadiff.storage.files import weight_files
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.strangers import check_model
from ofadiff.storage.structure import check_basis, check_fingerprints, check_structure

# What was read of a file stays resident while it is open, and opening it takes a millisecond or two.
TENSORS_PER_OPENING = 16


def load_extracted(
    directory: str | Path,
    stock: type[ModelMixin],
    subnet: Subnet,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> ModelMixin:
    """Loads one subnet out of a supernet's folder, reading only the part of every weight that it keeps.

    If the folder has an adapter of its size, that is merged.

    Args:
        directory: Folder of the denoiser, as `Supernet.save_pretrained` wrote it.
        stock: Class of the denoiser.
        subnet: Which one.
        torch_dtype: Dtype of the parameters; float32 unless it is a `torch.dtype`, as in diffusers.
        variant: Variant of the weight files, such as `"fp16"`.

    Returns:
        The extracted model, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If the folder holds no safetensors weights of that variant.
        ValueError: If it is no OFA checkpoint, or its files do not belong together.
    """
    directory, widths = Path(directory), subnet.widths
    values = read_ofa_config(directory)
    check_model(directory, stock, variant)
    check_structure(directory, values, variant)
    dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else torch.float32
    with default_dtype(dtype):
        small = empty_extracted_model(stock, stock.load_config(directory), widths)
    groups = groups_of(stock, stock.load_config(directory), widths)
    check_fingerprints(groups, values["groups"], directory)
    kept = kept_by_module(groups, widths)
    adapter = load_size_adapter(directory, subnet.size)
    state: dict[str, torch.Tensor] = {}
    for file, keys in weight_files(directory, variant).items():
        for start in range(0, len(keys), TENSORS_PER_OPENING):
            dtypes = {key: _dtype_of(stock, key, dtype) for key in keys[start : start + TENSORS_PER_OPENING]}
            state |= _read_parts(file, dtypes, kept)
    small.load_state_dict(state, assign=True, strict=True)
    if adapter is not None:
        adapter.merge_into(small)
    small.ofa_basis = load_basis(directory)
    check_basis(groups, small.ofa_basis, directory)
    return small


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A block in which models make parameters and buffers as diffusers has them made when it loads in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtype_of(stock: type[ModelMixin], key: str, dtype: torch.dtype) -> torch.dtype:
    """That a floating-point parameter gets when diffusers loads the model in `dtype`: some stay in float32."""
    kept = stock._keep_in_fp32_modules or []
    return torch.float32 if set(key.split(".")) & {*([kept] if isinstance(kept, str) else kept)} else dtype


def _read_parts(file: Path, dtypes: Mapping[str, torch.dtype], kept: Mapping[str, Kept]) -> dict[str, torch.Tensor]:
    """What a subnet keeps of some tensors in a file, copied: views would keep the file mapped."""
    parts = {}
    with open_tensors(file) as weights:
        for key, dtype in dtypes.items():
            module, _, name = key.rpartition(".")
            if kept.get(module):
                parts[key] = read_active_part(weights.get_slice(key), name, kept[module], dtype)
            else:
                tensor = weights.get_tensor(key)
                parts[key] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return parts

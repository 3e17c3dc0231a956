"""The basis that a group's units are written in, and how a weight of the original model gets there.

Sorting permutes the units of a group; rotating mixes the offsets of each attention head. Both leave the full-size model
unchanged, and both are remembered, because whatever was made for the original weights (a LoRA) has to follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ofadiff.channels import Slice, row_axis
from ofadiff.reading.tensors import read_tensors

PERMUTATION = "permutation"

BASIS_NAME = "ofa_basis.safetensors"

FLOATS = (torch.float16, torch.float32)
INTEGERS = (torch.int16, torch.int32)


def change_of_basis(group: str, part: Slice, basis: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What takes the original entries of a slice into the basis of its group.

    Args:
        group: Name of the group.
        part: One of its slices.
        basis: What `ofa_basis.safetensors` holds, by group and name.

    Returns:
        The order of the units, `(units,)` integer, or a matrix per head, `(heads, head_dim, head_dim)` float64.

    Raises:
        KeyError: If the basis knows nothing of the group.
    """
    if f"{group}.{PERMUTATION}" in basis:
        return basis[f"{group}.{PERMUTATION}"].long()
    matrices = basis[f"{group}.{part.basis}"].double()
    return inverse_transpose(matrices) if part.dual else matrices


def apply_change(tensor: torch.Tensor, dim: int, part: Slice, change: torch.Tensor) -> torch.Tensor:
    """A tensor with the entries of a slice along `dim` in another basis; everything else as it is.

    Args:
        tensor: A weight or bias, or one side of an adapter.
        dim: Its dimension that the slice lies on.
        part: The slice.
        change: From `change_of_basis`.

    Returns:
        A new tensor of the same shape, dtype and device. Matrices are applied in float64.
    """
    change = change.to(tensor.device)
    axis = tensor.movedim(dim, 0)
    own = axis[part.start : part.start + part.length]
    if change.is_floating_point():
        heads = own.to(torch.float64).unflatten(0, (part.repeats, part.units))
        changed = torch.einsum("hde,he...->hd...", change.to(torch.float64), heads).flatten(0, 1).to(tensor.dtype)
    else:
        changed = own[part.indices(change)]
    rest = axis[part.start + part.length :]
    return torch.cat([axis[: part.start], changed, rest]).movedim(0, dim)


@torch.no_grad()
def change_module(module: nn.Module, part: Slice, change: torch.Tensor) -> None:
    """Applies a change of basis to a module's own parameters, in place: rows and bias, or columns."""
    for name, parameter in module.named_parameters(recurse=False):
        if part.axis == "out":
            parameter.copy_(apply_change(parameter, row_axis(parameter.shape), part, change))
        elif name == "weight":
            parameter.copy_(apply_change(parameter, 1, part, change))


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """An entry of a basis in the smallest dtype that holds all its values exactly."""
    dtypes = FLOATS if tensor.is_floating_point() else INTEGERS
    return next((small for small in map(tensor.to, dtypes) if torch.equal(small.to(tensor.dtype), tensor)), tensor)


def save_basis(
    basis: Mapping[str, torch.Tensor], directory: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `ofa_basis.safetensors` into a denoiser's folder."""
    tensors = {name: tensor.contiguous() for name, tensor in basis.items()}
    save_file(tensors, Path(directory) / BASIS_NAME, None if metadata is None else dict(metadata))


def load_basis(directory: str | Path) -> dict[str, torch.Tensor]:
    """Reads `ofa_basis.safetensors` from a denoiser's folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    return read_tensors(Path(directory) / BASIS_NAME)


def inverse_transpose(matrices: torch.Tensor) -> torch.Tensor:
    """M⁻ᵀ of every matrix in `(…, d, d)`."""
    return torch.linalg.inv(matrices).mT

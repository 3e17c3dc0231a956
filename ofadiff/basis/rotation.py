"""Attention in the basis of its singular vectors: a prefix of the head dimension becomes the best low-rank cut.

With queries q = W_q x + b_q and keys k = W_k y + b_k of one head, attention only sees qᵀk = x̃ᵀ Aᵀ B ỹ, where
A = [W_q b_q] and B = [W_k b_k] act on inputs that end in a 1. For any invertible M, (M A)ᵀ (M⁻ᵀ B) is the same product.
M is chosen so that the rows of M A and M⁻ᵀ B are the singular directions of Aᵀ B in falling order: its first k rows are
then the best approximation of rank k (Eckart–Young). The same holds for values and output projection, W_o W_v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ofadiff.basis.change import change_module, inverse_transpose
from ofadiff.channels import ChannelGroup, Slice, check_groups

# Above this condition number of a factor, M would blow up rounding errors (and adapters that pass through it).
MAX_CONDITION = 1e5

# Under this condition number M may be rounded to float16.
ROUNDED_CONDITION = 64

# Left on an attention that was turned.
ROTATED = "_ofa_rotated"


@torch.no_grad()
def rotate_attention(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Turns every head's q/k and v/o pair into the basis of their singular vectors, in place.

    Changes nothing at full size, but for rounding in the weights' dtype. Only `rotatable` groups are turned: where a
    norm or a rotary embedding stands between the projections and the products, it would change the model. A head whose
    product has no full rank is only sorted, by the size of its offsets' products. Every turned group gets its `basis`:
    `"query_key"` M with q ← M q, k ← M⁻ᵀ k, and `"value_output"` N with v ← N v, W_o ← W_o N⁻¹, both
    `(heads, head_dim, head_dim)` float64, of values that float16 holds too (float32 where they are ill-conditioned).
    Units of such a group are in their final order, and `Supernet` does not sort them again.

    Args:
        model: The denoiser that the groups were found in, not on the meta device.
        groups: Its channel groups.

    Raises:
        ValueError: If a group, or the model's attention, was rotated before, or the groups are another model's.

    Example:
        >>> rotate_attention(unet, groups)
        >>> sorted(next(group for group in groups if group.rotatable).basis)
        ['query_key', 'value_output']
    """
    check_groups(model, groups)
    for group in groups:
        if group.basis is not None:
            raise ValueError(f"{group.name} is rotated already; rotate_attention may run once")
        check_not_rotated(model, group)
    for group in groups:
        if not group.rotatable:
            continue
        group.basis = {}
        setattr(model.get_submodule(group.block), ROTATED, True)
        for name in dict.fromkeys(part.basis for part in group.slices):
            sides: tuple[list[Slice], list[Slice]] = ([], [])
            for part in group.slices:
                if part.basis == name:
                    sides[part.dual].append(part)
            A, B = (torch.cat([_augmented(model, part) for part in side], dim=-1) for side in sides)
            M = group.basis[name] = _singular_basis(A, B)
            for side, change in zip(sides, (M, inverse_transpose(M)), strict=True):
                for part in side:
                    change_module(model.get_submodule(part.module), part, change)


def check_not_rotated(model: nn.Module, group: ChannelGroup) -> None:
    """Raises ValueError if the model was rotated with other groups: this one does not know the basis then."""
    if group.basis is None and ROTATED in vars(model.get_submodule(group.block)):
        raise ValueError(
            f"{group.name} was rotated with other groups; go on with those that rotate_attention was given"
        )


def _augmented(model: nn.Module, part: Slice) -> torch.Tensor:
    """A slice's rows (with their biases as one more column) or columns by head, `(heads, head_dim, inputs)` float64."""
    module = model.get_submodule(part.module)
    weight = module.weight.detach().double()
    if part.axis == "in":
        weight = weight.T
    elif module.bias is not None:
        weight = torch.cat([weight, module.bias.detach().double()[:, None]], dim=1)
    return weight[part.start : part.start + part.length].unflatten(0, (part.repeats, part.units))


def _singular_basis(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """M per head, such that the rows of M A and M⁻ᵀ B are the singular directions of Aᵀ B, most important first.

    Args:
        A: `(heads, d, inputs)`, float64.
        B: `(heads, d, inputs)`, float64.

    Returns:
        M, `(heads, d, d)`; for heads whose A or B is (nearly) rank-deficient a permutation, the largest products first.
    """
    heads, d = A.shape[:2]
    products = torch.linalg.vector_norm(A, dim=-1) * torch.linalg.vector_norm(B, dim=-1)
    M = torch.eye(d, dtype=A.dtype, device=A.device)[products.argsort(dim=-1, descending=True, stable=True)]
    if min(A.shape[-1], B.shape[-1]) < d:
        return M
    for head in range(heads):
        # A = R_Aᵀ Q_Aᵀ, so Aᵀ B = Q_A (R_A R_Bᵀ) Q_Bᵀ: the SVD is that of a d × d matrix.
        R_A = torch.linalg.qr(A[head].T, mode="r").R
        R_B = torch.linalg.qr(B[head].T, mode="r").R
        if max(torch.linalg.cond(R_A), torch.linalg.cond(R_B)) > MAX_CONDITION:
            continue
        U = torch.linalg.svd(R_A @ R_B.T).U
        M_0 = torch.linalg.solve(R_A, U).T
        # Row i of M may be scaled freely (and of M⁻ᵀ inversely). Equal norms on both sides condition M well.
        norms = torch.linalg.vector_norm(M_0, dim=1)
        norms_inverse = torch.linalg.vector_norm(inverse_transpose(M_0), dim=1)
        M[head] = (norms_inverse / norms).sqrt()[:, None] * M_0
    # M is kept for adapters, so it is rounded now, and what is kept is exactly what turned the weights. The basis stays
    # within rounding of the singular one; float32 where float16 could make an ill-conditioned matrix worse.
    short = torch.float16 if torch.linalg.cond(M).max() < ROUNDED_CONDITION else torch.float32
    return M.to(short).to(A.dtype)

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

from ofadiff.channels import ChannelGroup

# Above this condition number of a factor, M would blow up rounding errors (and adapters that pass through it).
MAX_CONDITION = 1e5


@torch.no_grad()
def rotate_attention(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Turns every head's q/k and v/o pair into the basis of their singular vectors, in place.

    Changes nothing at full size. Only groups whose `rotatable` is set are turned: where a norm or a rotary embedding
    stands between the projections and the products, it would change the model. A head whose product has no full rank
    stays as it was. Every turned group gets its `basis`: `"query_key"` M with q ← M q, k ← M⁻ᵀ k, and
    `"value_output"` N with v ← N v, W_o ← W_o N⁻¹, both `(heads, head_dim, head_dim)` float64. Units of such a group
    are in their final order, and `Supernet` does not sort them again.

    Args:
        model: The denoiser that the groups were found in, not on the meta device.
        groups: Its channel groups.

    Raises:
        ValueError: If a group was rotated before.
    """
    for group in groups:
        if not group.rotatable:
            continue
        if group.basis is not None:
            raise ValueError(f"{group.name} is rotated already; rotate_attention may run once")
        attn = model.get_submodule(group.name)
        heads = attn.heads
        queries, keys, values, output = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]
        query_key = _rotate([_rows(queries, heads)], [_rows(keys, heads)])
        value_output = _rotate([_rows(values, heads)], [_columns(output, heads)])
        group.basis = {"query_key": query_key, "value_output": value_output}
        turn_rows(queries, query_key)
        turn_rows(keys, _inverse_transpose(query_key))
        turn_rows(values, value_output)
        turn_columns(output, torch.linalg.inv(value_output))


def turn_rows(linear: nn.Linear, matrices: torch.Tensor) -> None:
    """Multiplies each head's rows (weight and bias) by its matrix from the left; matrices `(heads, d, d)`."""
    for parameter in linear.parameters(recurse=False):
        rows = parameter.detach().to(matrices).reshape(*matrices.shape[:2], -1)
        parameter.copy_((matrices @ rows).reshape(parameter.shape))


def turn_columns(linear: nn.Linear, matrices: torch.Tensor) -> None:
    """Multiplies each head's columns by its matrix from the right; matrices `(heads, d, d)`."""
    columns = linear.weight.detach().to(matrices).unflatten(1, matrices.shape[:2])
    linear.weight.copy_(torch.einsum("ohd,hde->ohe", columns, matrices).flatten(1))


def _rotate(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """M per head, such that the rows of M A and M⁻ᵀ B are the singular directions of Aᵀ B, most important first.

    Args:
        left: Parts of A, each `(heads, d, inputs)`.
        right: Parts of B, each `(heads, d, inputs)`.

    Returns:
        M, `(heads, d, d)`; the identity for heads whose A or B is (nearly) rank-deficient.
    """
    A, B = torch.cat(left, dim=-1), torch.cat(right, dim=-1)
    heads, d = A.shape[:2]
    M = torch.eye(d, dtype=A.dtype, device=A.device).repeat(heads, 1, 1)
    for head in range(heads):
        if min(A.shape[-1], B.shape[-1]) < d:
            continue
        # A = R_Aᵀ Q_Aᵀ, so Aᵀ B = Q_A (R_A R_Bᵀ) Q_Bᵀ: the SVD is that of a d × d matrix.
        R_A = torch.linalg.qr(A[head].T, mode="r").R
        R_B = torch.linalg.qr(B[head].T, mode="r").R
        if max(torch.linalg.cond(R_A), torch.linalg.cond(R_B)) > MAX_CONDITION:
            continue
        U = torch.linalg.svd(R_A @ R_B.T).U
        M_0 = torch.linalg.solve(R_A, U).T
        # Row i of M may be scaled freely (and of M⁻ᵀ inversely). Equal norms on both sides condition M well.
        norms = torch.linalg.vector_norm(M_0, dim=1)
        norms_inverse = torch.linalg.vector_norm(_inverse_transpose(M_0), dim=1)
        M[head] = (norms_inverse / norms).sqrt()[:, None] * M_0
    return M


def _rows(linear: nn.Linear, heads: int) -> torch.Tensor:
    """Weight with the bias as one more column, in float64 by head: `(heads, d, inputs)`."""
    weight = linear.weight.detach().double()
    if linear.bias is not None:
        weight = torch.cat([weight, linear.bias.detach().double()[:, None]], dim=1)
    return weight.unflatten(0, (heads, -1))


def _columns(linear: nn.Linear, heads: int) -> torch.Tensor:
    """Transposed weight in float64 by head: `(heads, d, outputs)`."""
    return linear.weight.detach().double().T.unflatten(0, (heads, -1))


def _inverse_transpose(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(matrix).mT

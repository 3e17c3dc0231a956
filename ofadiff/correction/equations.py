"""The normal equations of one layer's least squares over all sizes, and their solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# A residual this many times longer than the mean target counts as one of that length.
LARGEST_RESIDUAL = 10.0

# Adds up a tensor over all processes.
Reduce = Callable[[Tensor], Tensor]


class NormalEquations:
    """Sums of what a change of a layer's weights and bias has to fit, in float64.

    Every size s reads the columns C_s, a prefix of each group's, of the same weights. With X_s what it reads (and a
    column of ones for the bias) and R_s what its output lacks, the change Δ that minimises

        Σ_s w_s ‖X_s Δ[C_s] − R_s‖² + ρ ‖Δ‖²

    solves (Σ_s w_s X_sᵀX_s + ρ I) Δ = Σ_s w_s X_sᵀR_s, each term put where its columns are. Memory is that of the sums:
    8 bytes times columns times columns plus outputs.

    Args:
        columns: For every size the columns that it uses.
        width: Columns of the whole layer.
        outputs: Its rows.
        bias: Whether the layer has one.
        each: Whether the sums of single sizes are kept too.
    """

    def __init__(self, columns: Sequence[Tensor], width: int, outputs: int, bias: bool, each: bool = False) -> None:
        self.bias, self.width = bias, width
        device = columns[0].device
        ones = [torch.tensor([width], device=device)] if bias else []
        self.columns = [torch.cat([own, *ones]) for own in columns]
        full = width + len(ones)
        self.gram = torch.zeros(full, full, dtype=torch.float64, device=device)
        self.products = torch.zeros(full, outputs, dtype=torch.float64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        self.alone = [NormalEquations(columns, width, outputs, bias) for _ in columns] if each else []

    def uses(self, size: int) -> bool:
        """Whether a size reads anything; one that drops the branch keeps the bias alone."""
        return len(self.columns[size]) > self.bias

    def add(self, size: int, rows: Tensor, target: Tensor, output: Tensor, weight: float) -> None:
        """Adds what one size reads, `(rows, columns)`, and what it should give and gives, `(rows, outputs)` both.

        A row that lacks far more than targets are long counts no more than one that lacks `LARGEST_RESIDUAL` times
        their length (Huber's weights, 1964): a linear attention whose divisor comes close to zero would decide alone.
        """
        rows, residual = rows.double(), target.double() - output.double()
        if self.bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        length = target.double().square().sum(dim=1).mean().sqrt()
        lacking = residual.square().sum(dim=1, keepdim=True).sqrt()
        factor = (LARGEST_RESIDUAL * length / lacking.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1).sqrt()
        rows, residual = rows * factor, residual * factor
        columns = self.columns[size]
        gram, products = rows.T @ rows, rows.T @ residual
        self.gram[columns[:, None], columns] += weight * gram
        self.products[columns] += weight * products
        self.error += weight * residual.square().sum()
        if self.alone:
            own = self.alone[size]
            own.gram[columns[:, None], columns] += gram
            own.products[columns] += products

    def reduce(self, reduce: Reduce) -> None:
        """Adds up the sums of all processes."""
        self.gram, self.products, self.error = reduce(self.gram), reduce(self.products), reduce(self.error)
        for own in self.alone:
            own.reduce(reduce)

    def solve(self, ridge: float) -> Tensor:
        """The change Δ, `(columns and bias, outputs)`; ρ is `ridge` times the mean of the diagonal, 0 for the bias."""
        diagonal = self.gram.diagonal()[: self.width]
        used = diagonal > 0
        if not used.any():
            return torch.zeros_like(self.products)
        penalty = torch.zeros_like(self.gram.diagonal())
        penalty[: self.width] = ridge * diagonal[used].mean()
        factor = torch.linalg.cholesky(self.gram + penalty.diag())
        return torch.cholesky_solve(self.products, factor)

    def error_left(self, change: Tensor) -> float:
        """Share of the weighted squared error that is left with a change."""
        left = self.error - 2 * (change * self.products).sum() + (change * (self.gram @ change)).sum()
        return float(left / self.error) if self.error > 0 else 0.0

    def low_rank(self, size: int, change: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
        """What one size gains most by beside the shared change: up, `(outputs, rank)`, and down, `(rank, columns)`.

        The size's own solution beside `change`, cut to the rank that keeps most of its effect on the outputs: with
        G + ρ I = L Lᵀ and Lᵀ Δ = U S Vᵀ, the change L⁻ᵀ U S Vᵀ cut to that rank is the best in the norm of the outputs
        (Eckart and Young), as in the reduced-rank regression of Izenman (1975).
        """
        own, columns = self.alone[size], self.columns[size]
        if self.bias:
            columns = columns[:-1]
        gram = own.gram[columns[:, None], columns]
        all_columns = self.columns[size]
        lacking = own.products[columns] - own.gram[columns[:, None], all_columns] @ change[all_columns]
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
        whitened = torch.linalg.solve_triangular(factor, lacking, upper=False)  # Lᵀ Δ = L⁻¹ products
        u, s, v = torch.linalg.svd(whitened, full_matrices=False)
        root = s[:rank].sqrt()
        down = torch.linalg.solve_triangular(factor.T, u[:, :rank] * root, upper=True).T
        up = v[:rank].T * root
        missing = rank - len(root)  # a narrow layer has fewer directions; peft wants one rank
        return nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))

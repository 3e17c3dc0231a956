"""The normal equations of one layer's least squares over all sizes, and their solution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A residual this many times longer than the mean target counts as one of that length.
LARGEST_RESIDUAL = 10.0

# Shares of the mean square of what is read, of which the ridge is chosen: from nearly none to hardly any change.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

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
        # Of what a size reads alone, numbered from 0 on.
        self.alone = [
            NormalEquations([torch.arange(len(own), device=device)], len(own), outputs, bias)
            for own in (columns if each else ())
        ]

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
            own.gram += gram
            own.products += products
            own.error += residual.square().sum()

    def reduce(self, reduce: Reduce) -> None:
        """Adds up the sums of all processes."""
        for sums in (self, *self.alone):
            sums.gram, sums.products, sums.error = reduce(sums.gram), reduce(sums.products), reduce(sums.error)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The equations of both."""
        both = copy.copy(self)
        both.gram, both.products = self.gram + other.gram, self.products + other.products
        both.error = self.error + other.error
        both.alone = [own.plus(others) for own, others in zip(self.alone, other.alone, strict=True)]
        return both

    def beside(self, change: Tensor) -> NormalEquations:
        """What is left to fit beside a change, by a further one of the weights: equations without a bias."""
        left = copy.copy(self)
        left.bias, left.alone = False, []
        left.gram = self.gram[: self.width, : self.width]
        left.products = (self.products - self.gram @ change)[: self.width]
        left.error = self.error - self._gain(change)
        return left

    def solve(self, ridge: float) -> Tensor:
        """The change Δ, `(columns and bias, outputs)`; ρ is `ridge` times the mean of the diagonal, 0 for the bias."""
        factor = self._factor(ridge)
        return torch.zeros_like(self.products) if factor is None else torch.cholesky_solve(self.products, factor)

    def low_rank(self, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
        """The best change of a rank, for equations without a bias: up, `(outputs, rank)`, and down, `(rank, columns)`.

        The solution cut to the rank that keeps most of its effect on the outputs: with G + ρ I = L Lᵀ and
        Lᵀ Δ = U S Vᵀ, the change L⁻ᵀ U S Vᵀ cut to that rank is the best in the norm of the outputs (Eckart and Young),
        as in the reduced-rank regression of Izenman (1975).
        """
        factor = self._factor(ridge)
        if factor is None:
            return self.products.new_zeros(self.products.shape[1], rank), self.products.new_zeros(rank, self.width)
        whitened = torch.linalg.solve_triangular(factor, self.products, upper=False)  # Lᵀ Δ = L⁻¹ products
        u, s, v = torch.linalg.svd(whitened, full_matrices=False)
        root = s[:rank].sqrt()
        down = torch.linalg.solve_triangular(factor.T, u[:, :rank] * root, upper=True).T
        up = v[:rank].T * root
        missing = rank - len(root)  # a narrow layer has fewer directions; peft wants one rank
        return nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))

    def error_left(self, change: Tensor) -> float:
        """Share of the weighted squared error that is left with a change."""
        return 1 - float(self._gain(change) / self.error) if self.error > 0 else 0.0

    def _gain(self, change: Tensor) -> Tensor:
        return 2 * (change * self.products).sum() - (change * (self.gram @ change)).sum()

    def _factor(self, ridge: float) -> Tensor | None:
        """The Cholesky factor of the equations with a ridge; None where nothing is read."""
        diagonal = self.gram.diagonal()[: self.width]
        used = diagonal > 0
        if not used.any():
            return None
        penalty = torch.zeros_like(self.gram.diagonal())
        penalty[: self.width] = ridge * diagonal[used].mean()
        return torch.linalg.cholesky(self.gram + penalty.diag())


@dataclass(frozen=True)
class SplitEquations:
    """The normal equations of one layer, those of some samples, `unseen`, apart: they choose the ridge.

    With the ridge chosen so, few samples change little, and none of what they seem to ask for where the others do not
    gain by it: then the change is nothing.
    """

    seen: NormalEquations
    unseen: NormalEquations

    def reduce(self, reduce: Reduce) -> None:
        """Adds up the sums of all processes."""
        self.seen.reduce(reduce)
        self.unseen.reduce(reduce)

    def solve(self, ridge: float | None) -> tuple[Tensor, NormalEquations]:
        """The change of all samples, and their equations; with None, by the ridge that serves the unseen best."""
        every = self.seen.plus(self.unseen)
        ridge = ridge or _best_ridge(self.unseen, self.seen.solve)
        return (torch.zeros_like(every.products) if ridge is None else every.solve(ridge)), every

    def low_rank(self, size: int, change: Tensor, rank: int, ridge: float | None) -> tuple[Tensor, Tensor] | None:
        """What a size gains most by beside a change, see `NormalEquations.low_rank`; None where it does not gain.

        The ridge is chosen for a change of any rank: one decomposition instead of one for each.
        """
        own = change[self.seen.columns[size]]
        seen, unseen = (sums.alone[size].beside(own) for sums in (self.seen, self.unseen))
        ridge = ridge or _best_ridge(unseen, seen.solve)
        return None if ridge is None else seen.plus(unseen).low_rank(rank, ridge)


def _best_ridge(unseen: NormalEquations, solve: Callable[[float], Tensor]) -> float | None:
    """The ridge whose change leaves the least error on samples that it was not solved for; None if all of them harm."""
    if not unseen.error > 0:
        return None
    left = {ridge: unseen.error_left(solve(ridge)) for ridge in RIDGES}
    best = min(left, key=left.__getitem__)
    return best if left[best] < 1 else None

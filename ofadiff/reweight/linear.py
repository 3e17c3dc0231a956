"""Weights that fall linearly from the smallest subnet to the full one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def linear_weights(count: int, m: float = 3.0) -> list[float]:
    """The weight of each of `count` subnets, smallest first: from `m` in equal steps down to 1."""
    if count == 1:
        return [1.0]
    return [m + (1 - m) * rank / (count - 1) for rank in range(count)]


def linear(sizes: Sequence[float], step: int, seed: int, m: float = 3.0) -> float:
    """One size with a probability proportional to its weight (OFA-Diffusion, arXiv 2604.12668, equation 6).

    Args:
        sizes: The supernet's sizes, ascending.
        step: The optimizer step, from 0.
        seed: The run's seed.
        m: How many times more often the smallest size is drawn than the largest.

    Raises:
        ValueError: If m is not positive and finite.
    """
    check_m(m)
    return random.Random(f"{seed} {step}").choices(sizes, weights=linear_weights(len(sizes), m))[0]


def check_m(m: float) -> None:
    """Raises ValueError unless m is positive and finite."""
    if not 0 < m < math.inf:
        raise ValueError(
            f"m is {m}; it must be positive and finite: the weight of the smallest size, where the largest has 1"
        )

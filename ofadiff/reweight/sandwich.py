"""Smallest, largest and a random subnet in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ofadiff.reweight.uniform import uniform


def sandwich(sizes: Sequence[float], step: int, seed: int) -> float:
    """The sandwich rule (Yu and Huang, arXiv 1903.05134) spread over three steps of one subnet each."""
    return (sizes[0], sizes[-1], uniform(sizes, step, seed))[step % 3]

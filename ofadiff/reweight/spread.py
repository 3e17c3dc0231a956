"""The shares of `linear`, spread over the steps as evenly as they can be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from ofadiff.reweight.linear import check_m, linear_weights

# Multiples of the golden ratio, modulo one, leave no stretch of steps without its share of any interval.
GOLDEN_RATIO = (5**0.5 - 1) / 2


def spread(sizes: Sequence[float], step: int, seed: int, m: float = 3.0) -> float:
    """The size whose interval has the step's point of a low-discrepancy sequence; intervals are as long as weights.

    Independent draws of 800 steps give a size 80 steps, give or take 8; here it gets 80, and never waits long for one.
    The sequence is Weyl's, with the golden ratio, from a start that depends on the seed.

    Args:
        sizes: The supernet's sizes, ascending.
        step: The optimizer step, from 0.
        seed: The run's seed.
        m: How many times more often the smallest size is drawn than the largest (arXiv 2604.12668, equation 6).

    Raises:
        ValueError: If m is not positive and finite.
    """
    check_m(m)
    bounds = list(itertools.accumulate(linear_weights(len(sizes), m)))
    point = (random.Random(f"{seed}").random() + step * GOLDEN_RATIO) % 1 * bounds[-1]
    return next(size for size, bound in zip(sizes, bounds, strict=True) if point < bound or bound == bounds[-1])

"""Which subnet a training step trains. A strategy is a pure function `(sizes, step, seed, **options) -> size`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ofadiff.options import check_options
from ofadiff.reweight import linear, sandwich, spread, uniform

__all__ = ["STRATEGIES", "sample_size"]

# A new strategy is one file and one line here.
STRATEGIES: dict[str, Callable[..., float]] = {
    "spread": spread.spread,
    "linear": linear.linear,
    "uniform": uniform.uniform,
    "sandwich": sandwich.sandwich,
}


def sample_size(sizes: Iterable[float], step: int, seed: int, strategy: str = "linear", **options: float) -> float:
    """The size that is trained at `step`.

    A pure function of its arguments: every process of a run draws the same size, and a resumed run draws the same
    sizes as one that was never interrupted.

    Args:
        sizes: The supernet's sizes (fractions of the full model), in any order.
        step: The optimizer step, from 0.
        seed: The run's seed.
        strategy: A name of `STRATEGIES`.
        **options: Of the strategy; `spread` and `linear` take `m`.

    Raises:
        ValueError: If the strategy is unknown or takes no such option, or there are no sizes.

    Example:
        >>> sample_size((0.5, 1.0), step=0, seed=0, strategy="sandwich")
        0.5
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown reweighting strategy {strategy!r}; accepted: {', '.join(STRATEGIES)}")
    check_options(f"strategy {strategy!r}", STRATEGIES[strategy], options)
    ascending = sorted(sizes)
    if not ascending:
        raise ValueError("there are no sizes to draw from")
    return STRATEGIES[strategy](ascending, step, seed, **options)

"""Every subnet equally often."""

from __future__ import annotations

import random
from collections.abc import Sequence


def uniform(sizes: Sequence[float], step: int, seed: int) -> float:
    """One of `sizes`, each with the same probability."""
    return random.Random(f"{seed} {step}").choice(sizes)

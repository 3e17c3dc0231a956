"""Arguments of public functions: what is of the wrong type or out of range is one sentence, before any work."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number


def check_argument(name: str, value: Any, accepted: bool, words: str) -> None:
    """Raises ValueError unless an argument is accepted; names it, what it is, and in `words` what it must be."""
    if not accepted:
        raise ValueError(f"{name} is {shown(value)}; it must be {words}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless an argument is one of some words."""
    check_argument(name, value, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, words: str = "") -> None:
    """Raises ValueError unless an argument is a finite number, of Python or numpy, from `low` to `high`."""
    check_argument(name, value, is_number(value) and low <= value <= high, words or "a finite number")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless an argument is a whole number, of Python or numpy, of at least `least`."""
    check_argument(name, value, _is_whole(value) and value >= least, f"a whole number of at least {least}")


def check_seed(name: str, value: Any) -> None:
    """Raises ValueError unless an argument is a whole number that generators of torch take."""
    check_argument(name, value, _is_whole(value) and -(2**63) <= value < 2**63, "a whole number of 64 bits")


def check_dict(name: str, value: Any) -> None:
    """Raises ValueError unless an argument is None or a dict by words."""
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    check_argument(name, value, value is None or named, "a dict whose keys are words, or None")


def check_list(name: str, value: Any, words: str) -> None:
    """Raises ValueError unless an argument is None or a list, a tuple or the like; one text is none."""
    several = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
    check_argument(name, value, value is None or several, f"a list of {words}, or None")


def is_loader(value: Any) -> bool:
    """Whether an argument gives batches: a list, a loader, a generator; one batch alone, a text or a dict is none."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, torch.Tensor))


def check_path(name: str, value: Any) -> None:
    """Raises ValueError unless an argument may be a path, which an empty word is not."""
    check_argument(name, value, isinstance(value, (str, Path)) and str(value) != "", "a path")
    check_argument(name, value, "\0" not in str(value), "a path, which has no null character")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)

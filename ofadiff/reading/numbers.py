"""Numbers that users give, of Python or of numpy."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number that a float can hold, and neither a truth value nor infinite nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

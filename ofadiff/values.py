"""What settings may be: ranges and choices, checked alike from a command line, a YAML file and Python."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, get_type_hints

from cyclopts import Parameter, Token

from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number


class Range:
    """A range of numbers; None and every entry of a tuple are looked at too.

    Args:
        low: Smallest number.
        high: Largest number; every number has to be finite.
        ends: Round brackets leave an end out.
        what: What such a number is called.
    """

    def __init__(self, low: float, high: float = math.inf, ends: str = "[]", what: str = "number") -> None:
        self.low, self.high, self.ends, self.what = low, high, ends, what

    def __call__(self, type_: Any, value: Any) -> None:
        """Raises ValueError for a number outside, naming it and what is accepted."""
        if value == ():
            raise ValueError("there has to be at least one value")
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not isinstance(number, str) and not self._holds(number):
                said = f"{number:g}" if isinstance(number, float) else shown(number)
                raise ValueError(f"'{said}' is not a {self.what} {self.in_words()}")

    def _holds(self, number: Any) -> bool:
        if not is_number(number):
            return False
        inside = self.low <= number <= self.high
        at_an_end = (self.ends[0] == "(" and number == self.low) or (self.ends[1] == ")" and number == self.high)
        return inside and not at_an_end

    def in_words(self) -> str:
        """Such as `of at least 1` or `in [0, 1)`."""
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return f"of at least {self.low:g}" if self.ends[0] == "[" else f"greater than {self.low:g}"


class SizeRange(Range):
    """Fractions of the full model."""

    def __init__(self) -> None:
        super().__init__(0, 1, "(]", what="size;")

    def in_words(self) -> str:
        """What sizes are."""
        return "sizes are fractions in (0, 1], such as 0.5"


class OneOf:
    """One of the names in a table, as it is when a setting is made."""

    def __init__(self, table: Collection[str]) -> None:
        self.table = table

    def __call__(self, type_: Any, value: Any) -> None:
        """Raises ValueError for another name, listing those there are."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and name not in self.table:
                raise ValueError(f"'{name}' is none of {', '.join(self.table)}")


# One of the sizes of a checkpoint, as `SizeTable.find` takes it.
SizeOrName = float | Literal["smallest", "largest"]


def _whole(type_: Any, tokens: Sequence[Token]) -> int:
    """A whole number; cyclopts itself rounds."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number") from None


WHOLE = Parameter(converter=_whole)
COUNT = Parameter(converter=_whole, validator=Range(1, what="whole number"))
PORT = Parameter(converter=_whole, validator=Range(1, 65535, what="whole number"))
COUNT_OR_NONE = Parameter(converter=_whole, validator=Range(0, what="whole number"))
POSITIVE = Parameter(validator=Range(0, ends="(]"))
AT_LEAST_ZERO = Parameter(validator=Range(0))
SHARE = Parameter(validator=Range(0, 1))
BELOW_ONE = Parameter(validator=Range(0, 1, "[)"))
SIZES = Parameter(validator=SizeRange())


def one_of(table: Collection[str]) -> Parameter:
    """A parameter that is a name in a table."""
    return Parameter(validator=OneOf(table))


class Bundle:
    """What settings are derived from: a frozen dataclass whose fields are what their annotations say, whoever makes it.

    Its fields are keyword-only, and flags of a command line; the string under a field is its help.

    Raises:
        ValueError: If a value is outside of its range, or none of the choices.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for parameter in getattr(hint, "__metadata__", ()):
                for validator in parameter.validator:
                    try:
                        validator(None, getattr(self, name))
                    except ValueError as error:
                        raise ValueError(f"--{name}: {error}") from None

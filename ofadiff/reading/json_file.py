"""JSON files, and whether they say what they must."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofadiff.reading.files import check_file

# What kinds of values are called in errors.
KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}


# Lists and objects within each other that are read; whoever walks through more of them runs out of stack.
MOST_LEVELS = 100

# How a string begins to name half of a character beyond the first 65,536; the other half belongs behind it.
HALF = re.compile(r"\\u[dD][89a-fA-F]")

# Digits of a whole number that are read: as many as a float has at most, which it is compared and shown as.
MOST_DIGITS = 308


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON; says where it stops being.
    """
    check_file(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """The value that a text is as JSON.

    Args:
        text: It.
        where: What it is called, for errors.

    Raises:
        ValueError: If it is no JSON, is nested deeper than anything that is written here, or has a number that is
            longer than any float, or a string that is no text.
    """
    too_deep = f"{where} is not JSON that can be read: it is nested too deeply, more than {MOST_LEVELS} levels"
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(too_deep) from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if text.count("[") + text.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise ValueError(too_deep)
    if HALF.search(text) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has half of a character in a string, which cannot be written as UTF-8") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def _levels(value: Any) -> int:
    """How many lists and objects of a JSON value lie within each other, counted up to one more than may be."""
    levels, inner = 0, [value]
    while inner := [each for each in inner if isinstance(each, (dict, list))]:
        levels += 1
        if levels > MOST_LEVELS:
            break
        inner = [entry for each in inner for entry in (each.values() if isinstance(each, dict) else each)]
    return levels


def read_object(path: str | Path, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        kinds: Keys that it must have, each with the type of its value: one of `KINDS`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON, no object, lacks one of the keys or has another type of value there.
    """
    values = read_json(path)
    check_object(values, str(path), kinds or {})
    return values


def check_object(
    values: Any, where: str, kinds: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> None:
    """Raises ValueError unless a value is an object with certain keys.

    Args:
        values: The value.
        where: What it is called, for errors.
        kinds: Keys that it must have, each with the type of its value: one of `KINDS`.
        optional: Keys that it may lack or leave null.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values)}; it must be an object")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{where} has no {name!r}; it must be {KINDS[kind]}")
    for name, kind in {**kinds, **(optional or {})}.items():
        value = values.get(name)
        if value is None and name not in kinds:
            continue
        if not is_kind(value, kind):
            raise ValueError(f"{where} has the {name} {shown(value)}; it must be {KINDS[kind]}")


def is_kind(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a type: `float` takes whole numbers too and nothing that is not finite."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def shown(value: Any) -> str:
    """A value as an error shows it: one short line."""
    text = repr(value)
    line = text.partition("\n")[0]
    return text if len(line) == len(text) <= 80 else f"{line[:77]}..."

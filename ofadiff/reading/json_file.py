"""JSON files, and whether they say what they must."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What kinds of values are called in errors.
KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON; says where it stops being.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


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
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def shown(value: Any) -> str:
    """A value as an error shows it: short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

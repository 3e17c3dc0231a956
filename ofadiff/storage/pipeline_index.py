"""`model_index.json`: which parts a pipeline has, and of which classes they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ofadiff.reading.json_file import read_object, shown

INDEX_NAME = "model_index.json"

# What a library, and a class in it, may be called.
DOTTED = re.compile(r"\w+(\.\w+)*")


def read_index(folder: str | Path) -> dict[str, Any]:
    """What `model_index.json` in a pipeline's folder says.

    Its keys are folders of components, so they may be nothing but plain names; a component is `[library, class]`.

    Raises:
        ValueError: If there is none, it is no JSON object, names no pipeline class, or has such a key.
    """
    path = Path(folder) / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {INDEX_NAME}, so it is no diffusers pipeline folder")
    index = read_object(path)
    if not isinstance(index.get("_class_name"), (str, list)):
        raise ValueError(f"{path} has the _class_name {shown(index.get('_class_name'))}; it must name a pipeline class")
    for name, value in index.items():
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"{path} has the component {shown(name)}; its name must be a plain word")
        of_two = isinstance(value, list) and len(value) == 2 and any(isinstance(entry, str | None) for entry in value)
        is_component = not name.startswith("_") and (of_two or (Path(folder) / name).is_dir())
        absent = value == [None, None]
        pair = of_two and all(isinstance(entry, str) and DOTTED.fullmatch(entry) for entry in value)
        if is_component and not (pair or absent):
            raise ValueError(f"{path} says {shown(value)} of its {name}; it must be a library and a class")
    return index


def components_in(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that a pipeline was saved with: library and class, by name."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
    }

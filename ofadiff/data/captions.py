"""Images with captions to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Captions = Sequence[tuple[str, ...]]


def dataset_captions(dataset: Any, caption_column: str = "text") -> Captions:
    """The captions of one split of a `datasets` data set, one or several for each image.

    Args:
        dataset: A `datasets.Dataset`.
        caption_column: Its column of captions: strings, or lists of strings; `json.text` is an entry of a column.

    Raises:
        ValueError: If there is no such column, or an image has no caption.
    """
    column, *inner = column_path(dataset.column_names, caption_column)
    dataset = dataset.with_format(None)
    captions = []
    for row, value in enumerate(dataset[column]):
        try:
            captions.append(caption_choices(find_entry(value, inner)))
        except ValueError as error:
            raise ValueError(f"row {row} of column {caption_column!r} holds {error}") from error
    return captions


def caption_choices(value: Any) -> tuple[str, ...]:
    """The captions of one image. Raises ValueError, saying what there is instead."""
    several = tuple(value) if isinstance(value, list) else (value,)
    if not several or not all(isinstance(caption, str) for caption in several):
        raise ValueError(f"{value!r}; a caption is a string, or a list of some")
    return several


def column_path(columns: Sequence[str], name: str) -> list[str]:
    """A column of captions, or where in a column they are: `json.text` is the entry `text` of the column `json`.

    Raises:
        ValueError: If there is no such column.
    """
    path = [name] if name in columns else name.split(".")
    if path[0] not in columns:
        raise ValueError(
            f"the data set has no column {name!r} of captions; its columns: {', '.join(columns)}; an image folder gets "
            'one from a metadata.jsonl with lines such as {"file_name": "0001.png", "text": "a red house"}'
        )
    return path


def find_entry(value: Any, path: Sequence[str]) -> Any:
    """What is at a path of names in dicts of dicts; None if there is nothing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value

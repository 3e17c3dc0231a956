"""Prompts of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofadiff.data.text import read_lines, read_table, read_text
from ofadiff.reading.json_file import parse_json

# What files call the prompt; the first of these that they have.
COLUMNS = ("text", "prompt")


def read_prompts(file: str | Path) -> list[str]:
    """Prompts, in the order of the file.

    Args:
        file: By its ending: `.jsonl` with an object a line, `.json` with a list, `.csv` or `.tsv` with a header, or any
            other text with one prompt a line. Objects and tables have the prompt under `"text"` or `"prompt"`; of
            several captions in a list the first counts. Empty lines are skipped. The encoding is UTF-8, or what a byte
            order mark says.

    Raises:
        ValueError: If there is no such file, it is no text of that kind, or there are no prompts in it.

    Example:
        >>> prompts = read_prompts("images/metadata.jsonl")
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file of prompts")
    prompts = READERS.get(file.suffix.lower(), _lines)(file)
    if not prompts:
        raise ValueError(f"there are no prompts in {file}")
    return prompts


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_lines(file) if line.strip()]


def _json_lines(file: Path) -> list[str]:
    lines = ((number, line) for number, line in enumerate(read_lines(file), 1) if line.strip())
    return [_prompt(parse_json(line, f"{file}, line {number}"), f"{file}, line {number}") for number, line in lines]


def _json_list(file: Path) -> list[str]:
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a {type(entries).__name__}; it must be a list of prompts")
    return [_prompt(entry, f"{file}, entry {number}") for number, entry in enumerate(entries, 1)]


def _table(file: Path) -> list[str]:
    columns, rows = read_table(file)
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        found = ", ".join(columns) or "none"
        raise ValueError(f"{file} has no column {' or '.join(COLUMNS)}; its first line names {found}")
    prompts = []
    for number, row in enumerate(rows, 1):
        prompt = row[column]
        if prompt is None:
            raise ValueError(f"{file}, row {number} has no {column}")
        prompts.append(prompt.strip())
    return prompts


def _prompt(entry: Any, where: str) -> str:
    text = next((entry[name] for name in COLUMNS if name in entry), None) if isinstance(entry, dict) else entry
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string under "text" or "prompt"')
    return text


# By the ending of the file's name.
READERS: dict[str, Callable[[Path], list[str]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}

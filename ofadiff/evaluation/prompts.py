"""Prompts of a file."""

from __future__ import annotations

import json
from pathlib import Path


def read_prompts(file: str | Path) -> list[str]:
    """Prompts, in the order of the file.

    Args:
        file: Text with one prompt a line, or a `.jsonl` with the prompt of every line under `"text"`; of several
            captions in a list the first. Empty lines are skipped.

    Raises:
        ValueError: If there is no such file, there are no prompts in it, or a line of a `.jsonl` has none.

    Example:
        >>> prompts = read_prompts("images/metadata.jsonl")
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file of prompts")
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    prompts = [
        _text(line, f"{file}, line {number}") if file.suffix == ".jsonl" else line.strip()
        for number, line in lines
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"there are no prompts in {file}")
    return prompts


def _text(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string under "text"')
    return text

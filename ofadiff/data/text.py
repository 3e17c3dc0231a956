"""Text files as people have them."""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path

# By what a file begins with.
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte order mark names; without that mark.

    Raises:
        ValueError: If it is no text of that encoding; says where it stops being.
    """
    content = Path(file).read_bytes()
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise ValueError(f"{file} is no text file: it holds zero bytes")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{file} is not {encoding.upper().removesuffix('-SIG')}: byte {error.start}, in line {line}, is "
            f"{content[error.start : error.start + 1]!r}; save it as UTF-8"
        ) from error


def read_lines(file: str | Path) -> list[str]:
    r"""The lines of a text file, which end in `\n` or `\r\n` and in nothing else.

    Raises:
        ValueError: If it is no text.
    """
    return [line.removesuffix("\r") for line in read_text(file).split("\n")]


def read_table(file: str | Path) -> tuple[list[str], list[dict[str | None, str | None]]]:
    """The columns and the rows of a `.csv`, or of a `.tsv`, whose first line names the columns.

    Cells that a row lacks are None; those that it has too many are under the key None.

    Raises:
        ValueError: If it is no text, or a cell is longer than any is.
    """
    delimiter = "\t" if Path(file).suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), delimiter=delimiter)
    try:
        return list(rows.fieldnames or []), list(rows)
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num + 1} is no row of a table: {error}") from error

"""Text files as people have them."""

from __future__ import annotations

import codecs
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

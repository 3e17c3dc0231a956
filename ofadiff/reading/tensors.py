"""Safetensors files: opened so that a damaged one is an error with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ofadiff.reading.files import check_file

# What lies in place of weights where a download went wrong, by how the file begins.
INSTEAD = {
    b"version https://git-lfs": "it is the pointer of a file that git-lfs has not fetched (`git lfs pull` does)",
    b"<": "it is a web page that was saved in place of the file",
    b"\x80": "it is a pickle, which is not opened",
    b"PK\x03\x04": "it is a zip archive, as PyTorch pickles into, which is not opened",
}


@contextmanager
def open_tensors(file: str | Path) -> Iterator[Any]:
    """A safetensors file, opened: what `safetensors.safe_open` gives, for PyTorch on the CPU.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged, cut short, something else, or lacks a tensor that is asked for.
    """
    check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {_reason(file, error)}") from error


def read_tensors(file: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, by name.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_metadata(file: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged.
    """
    with open_tensors(file) as opened:
        return opened.metadata() or {}


@dataclass(frozen=True)
class Stored:
    """What the header of a safetensors file says of a tensor: its shape, and its dtype in the file's word: `"F32"`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers or truth values."""
        return self.dtype.startswith(("I", "U", "BOOL"))


def read_header(file: str | Path) -> dict[str, Stored]:
    """Shapes and dtypes of the tensors of a safetensors file, by name; only its header is read.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged.
    """
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: Stored(tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}


def _reason(file: str | Path, error: SafetensorError) -> str:
    with Path(file).open("rb") as opened:
        start = opened.read(max(map(len, INSTEAD)))
    if not start:
        return "it is empty"
    instead = next((what for mark, what in INSTEAD.items() if start.startswith(mark)), None)
    if instead is not None and "does not contain tensor" not in str(error):
        return instead
    return f"it is damaged, cut short or no safetensors file ({' '.join(str(error).split())})"

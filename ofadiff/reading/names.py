"""Names of files that stand in files, and links: neither may lead out of a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ofadiff.reading.json_file import shown


def file_in(folder: str | Path, name: Any, where: str) -> Path:
    """A file of a folder by the name that another file gives it.

    Args:
        folder: The folder.
        name: What stands in the other file.
        where: Which file that is, for the error.

    Raises:
        ValueError: If it is no plain name of a file, such as one that leads to another folder.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not plain:
        raise ValueError(f"{where} names the file {shown(name)}; it must be the plain name of a file beside it")
    return Path(folder) / name


def check_variant(variant: Any) -> None:
    """Raises ValueError unless a variant, which becomes a part of names of files, is a plain word or None."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-][\w.-]*", variant)):
        raise ValueError(f"variant is {shown(variant)}; it must be a plain word, such as 'fp16'")


def check_stays(path: Path, folder: Path) -> None:
    """Raises ValueError if what is to be written to a path in a folder would land outside of it, through a link."""
    if not resolved(path).is_relative_to(resolved(folder)):
        raise ValueError(f"{path} is a link that leads out of {folder}, to {resolved(path)}; nothing is written there")


def check_links(folder: Path) -> None:
    """Raises ValueError if a link below a folder leads out of it, so that copying it would copy something else, or to a
    folder in which copying would go in circles.

    The hub's cache, whose snapshots are links to files beside them, is no other folder. A link in the folder itself may
    lead to another folder in it.
    """
    within = [resolved(folder)]
    if resolved(folder).parent.name == "snapshots":
        within.append(resolved(resolved(folder).parent.parent / "blobs"))
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        if not any(resolved(path).is_relative_to(each) for each in within):
            raise ValueError(
                f"{path} is a link that leads out of {folder}, to {resolved(path)}; put a copy in its place if that "
                "file belongs to the model"
            )
        if path.is_dir() and (path.parent != folder or within[0].is_relative_to(resolved(path))):
            raise ValueError(f"{path} is a link to the folder {resolved(path)}; put a copy in its place, or remove it")


def resolved(path: str | Path) -> Path:
    """Where a path leads, through all links; one that leads back to itself is where it is."""
    return Path(os.path.realpath(path))

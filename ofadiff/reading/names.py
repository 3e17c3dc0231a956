"""Names of files that stand in files, and links: neither may lead out of a folder."""

from __future__ import annotations

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


def check_stays(path: Path, folder: Path) -> None:
    """Raises ValueError if what is to be written to a path in a folder would land outside of it, through a link."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link that leads out of {folder}, to {path.resolve()}; nothing is written there")


def check_links(folder: Path) -> None:
    """Raises ValueError if a link below a folder leads out of it, so that copying it would copy something else.

    The hub's cache, whose snapshots are links to files beside them, is no other folder.
    """
    within = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        within.append((folder.resolve().parent.parent / "blobs").resolve())
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(each) for each in within):
            raise ValueError(
                f"{path} is a link that leads out of {folder}, to {path.resolve()}; put a copy in its place if that "
                "file belongs to the model"
            )

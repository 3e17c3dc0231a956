"""Files: what is opened to be read is one, and no pipe that never ends."""

from __future__ import annotations

from pathlib import Path


def check_file(path: str | Path) -> None:
    """Raises ValueError if what is at a path is no file: a folder, or what a reader would wait for, such as a pipe.

    Where there is nothing, or a link that leads nowhere, opening it says so.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; it must be a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe, a socket or a device; it must be a file")


def check_files(folder: Path) -> None:
    """Raises ValueError if below a folder lies what is neither a file nor a folder."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            check_file(path)

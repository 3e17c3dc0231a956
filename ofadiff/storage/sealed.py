"""Folders that tell whether they are whole: beside their files lies a digest of each, written last.

A kill cannot tear a file that is written aside and renamed. A machine that loses its power can, a disk that is full or
failing, a copy that was broken off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ofadiff.reading.json_file import read_object

DIGESTS_NAME = "digests.json"

# Read at once.
CHUNK_BYTES = 2**22


def seal(folder: str | Path) -> None:
    """Writes what tells a folder's files from any others, and waits until all of it is on the disk."""
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("r+b") as file:
                files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                os.fsync(file.fileno())
    with (folder / DIGESTS_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"files": files}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)


def find_fault(folder: str | Path, contents: bool = True) -> str | None:
    """What is wrong with a sealed folder, in words; None if it is what it was when it was sealed.

    Args:
        folder: The folder.
        contents: Whether every file is read and compared with its digest; otherwise only its length is looked at.
    """
    folder = Path(folder)
    if not (folder / DIGESTS_NAME).is_file():
        return f"{DIGESTS_NAME} is missing"
    try:
        files = read_object(folder / DIGESTS_NAME, {"files": dict})["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS_NAME} is not what was written"
    for name, (length, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != length:
            return f"{name} has {path.stat().st_size} bytes, {length} were written"
        if contents and _sha256(path) != digest:
            return f"{name} is not what was written, its digest is another"
    return None


@contextmanager
def sealed_aside(folder: str | Path) -> Iterator[Path]:
    """An empty hidden folder beside another one; when the block ends without an error, it is sealed and
    takes its place.

    At every moment the old folder or the new one is whole, if only under a hidden name: see `orphan_of`. What an error
    leaves of the new one is removed.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        seal(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _take_place(unfinished, folder)


def orphan_of(folder: str | Path) -> Path:
    """Where the old folder lies if a kill came between the two renames that replace it."""
    return Path(folder).with_name(f".{Path(folder).name}-replaced")


def remove(folder: str | Path) -> None:
    """Removes a folder; a kill leaves it whole, or nothing under its name."""
    folder = Path(folder)
    removed = folder.with_name(f".{folder.name.removeprefix('.')}-removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def _take_place(unfinished: Path, folder: Path) -> None:
    """Renames a whole folder to one that may be there."""
    replaced = orphan_of(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

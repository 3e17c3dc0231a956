"""Output folders: whether one can be made, before anything takes long."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ofadiff.reading.arguments import check_path
from ofadiff.reading.json_file import shown
from ofadiff.reading.names import resolved

# Bytes of a name and of a path that file systems take; files in the folder have names too.
LONGEST_NAME, LONGEST_PATH = 255, 3800


def check_folder(what: str, folder: str | Path, read: Iterable[str | None] = ()) -> None:
    """Raises ValueError unless a folder is there, or can be made, and may be written to.

    Args:
        what: What the folder is called, such as `--output_dir`.
        folder: It.
        read: Folders that are read while it is written; it may be one of them, but not lie in one. Names that are no
            folders, such as those of the hub, and None are passed over.
    """
    check_path(what, folder)
    folder = Path(folder)
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        kind = "a file" if above.exists() else "a link that leads nowhere"
        where = "" if above == folder else f", where {above}"
        raise ValueError(f"{what} {folder}{where} is {kind}; it must be a folder, or not there yet")
    longest = max(folder.absolute().parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > LONGEST_NAME or len(os.fsencode(folder.absolute())) > LONGEST_PATH:
        raise ValueError(
            f"{what} {shown(str(folder))} is too long: a name may have {LONGEST_NAME} bytes, a path {LONGEST_PATH}"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{what} {folder} cannot be written: {above} may not be written to")
    for name in read:
        if name is not None and Path(name).is_dir() and resolved(name) in resolved(folder).parents:
            raise ValueError(f"{what} {folder} lies in {name}, which is read; give a folder elsewhere")

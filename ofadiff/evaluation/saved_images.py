"""Images on disk, one PNG each, and the protocol that they were made by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ofadiff.data.decoding import decode_image, open_image
from ofadiff.reading.json_file import read_object

PROTOCOL_NAME = "protocol.json"
UNFINISHED = ".tmp"
# The chunk that ends every PNG; one that was cut short lacks it.
LAST_CHUNK = b"\0\0\0\0IEND\xaeB\x60\x82"


class SavedImages:
    """Images by index, as uint8 `(3, H, W)`: `images[7] = image` writes `000007.png`, whole or not at all.

    Args:
        folder: Where they lie; made by `begin`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def check(self, protocol: Mapping[str, Any], overwrite: bool = False) -> None:
        """Raises ValueError if the folder holds anything but images made by this protocol, or to overwrite, by any."""
        if not self.folder.exists():
            return
        # Killed before anything was written, an evaluation leaves nothing, or the beginnings of a protocol.
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {PROTOCOL_NAME + UNFINISHED}:
            return
        saved = self._read_protocol()
        if saved is None:
            raise ValueError(f"{self.folder} holds no images of an evaluation; choose another folder or remove it")
        for name in () if overwrite else sorted({*saved, *protocol}):
            if saved.get(name) != protocol.get(name):
                raise ValueError(
                    f"the images in {self.folder} were made with {name} {saved.get(name)}, not {protocol.get(name)}; "
                    "choose another folder, or start over with --overwrite_output_dir"
                )

    def begin(self, protocol: Mapping[str, Any]) -> None:
        """Makes the folder, with the protocol in it; images follow."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(PROTOCOL_NAME, (json.dumps(protocol, indent=2, ensure_ascii=False) + "\n").encode())

    def remove(self) -> None:
        """Removes the folder, if it holds images of an evaluation; the protocol last, so that what is left has one."""
        if self._read_protocol() is None:
            return
        for path in [*self.folder.iterdir()]:
            if path.is_file() and path.name != PROTOCOL_NAME:
                path.unlink()
        shutil.rmtree(self.folder)

    def __contains__(self, index: int) -> bool:
        path = self._path(index)
        if not path.is_file() or path.stat().st_size < len(LAST_CHUNK):
            return False
        with path.open("rb") as file:
            file.seek(-len(LAST_CHUNK), os.SEEK_END)
            return file.read() == LAST_CHUNK

    def __getitem__(self, index: int) -> torch.Tensor:
        with open_image(self._path(index)) as image:
            return pil_to_tensor(decode_image(image))

    def __setitem__(self, index: int, image: torch.Tensor) -> None:
        path = self._path(index)
        unfinished = path.with_suffix(UNFINISHED)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(unfinished, "PNG")
        unfinished.replace(path)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06}.png"

    def _read_protocol(self) -> dict[str, Any] | None:
        path = self.folder / PROTOCOL_NAME
        return read_object(path) if path.is_file() else None

    def _write(self, name: str, content: bytes) -> None:
        unfinished = self.folder / f"{name}{UNFINISHED}"
        unfinished.write_bytes(content)
        unfinished.replace(self.folder / name)

"""Encoded images and captions on disk: encoded once, the VAE and the text encoders are needed no more.

A folder of safetensors, one file for each image: the distribution of its latents, plain and mirrored, and the
embeddings of its captions. What a sample draws (its flip, its caption, its latent's noise) it still draws anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.order import Key
from ofadiff.denoisers.encoder import Encoder
from ofadiff.reading.json_file import read_object
from ofadiff.reading.tensors import open_tensors

DESCRIPTION = "latents.json"
EMPTY_CAPTION = "empty_caption.safetensors"
LATENTS = ("latent_mean", "latent_std")
PER_FOLDER = 1000


class LatentCache:
    """A folder of encoded samples.

    Args:
        folder: Made by `write` if it is not there.
        description: Everything its contents depend on (JSON values), such as the model and the resolution.

    Raises:
        ValueError: If the folder holds something else, or was written with another description.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.description = description
        path = self.folder / DESCRIPTION
        if not path.is_file():
            # A run that was killed at once leaves an unfinished description.
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.glob("[!.]*"))):
                raise ValueError(f"{folder} is no folder of cached latents: it has no {DESCRIPTION}, and is not empty")
            return
        saved = read_object(path)
        for name in description:
            if saved.get(name) != description[name]:
                raise ValueError(
                    f"the latents in {folder} were made with {name} {saved.get(name)}, not {description[name]}; "
                    "choose another folder or remove it"
                )

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / f"{index // PER_FOLDER:05}" / f"{index:08}.safetensors"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of the images that have no file yet."""
        return [index for index in indices if not self.path(index).is_file()]

    def write(
        self,
        data: TextToImageData,
        encoder: Encoder,
        process: int = 0,
        processes: int = 1,
        num_workers: int = 0,
        progress: bool = False,
    ) -> None:
        """Encodes what has no file yet; of several processes, this one's share of it.

        Args:
            data: With `center_crop`; all of its images, with the mirrored ones if it flips.
            encoder: On its device.
            process: Number of this process.
            processes: How many there are; they all have to be called.
            num_workers: Processes that load images.
            progress: Whether to show a bar.

        Raises:
            ValueError: If the data crop at random.
        """
        if not data.center_crop:
            raise ValueError("only centre crops can be encoded once; random ones differ every time")
        self.folder.mkdir(parents=True, exist_ok=True)
        # The same bytes from every process; complete before any file that it describes.
        unfinished = _unfinished(self.folder / DESCRIPTION, process)
        unfinished.write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.folder / DESCRIPTION)
        if not (self.folder / EMPTY_CAPTION).is_file():
            self._save(self.folder / EMPTY_CAPTION, encoder.encode_captions([""]), process)
        todo = [index for index in self.missing(data.indices) if index % processes == process]
        views = DataLoader(_Views(data), batch_size=None, sampler=todo, num_workers=num_workers)
        for index, view in zip(todo, tqdm(views, "Encoding images", disable=not progress), strict=True):
            text = encoder.encode_captions(data.captions[index])
            latents = encoder.encode_images(view["pixel_values"])
            self._save(self.path(index), {**latents, **text, "time_ids": view["time_ids"]}, process)

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], process: int) -> None:
        path.parent.mkdir(exist_ok=True)
        unfinished = _unfinished(path, process)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, path)


def _unfinished(path: Path, process: int) -> Path:
    """The name under which a process writes a file; it is renamed once it is whole."""
    return path.with_name(f".{path.name}.{process}")


class _Views(Dataset[dict[str, Any]]):
    """Pixels of an image, plain and, if the data flips, mirrored."""

    def __init__(self, data: TextToImageData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> dict[str, Any]:
        flips = (False, True) if self.data.random_flip else (False,)
        views = [self.data.view(index, flip, seed=0) for flip in flips]
        return {
            "pixel_values": torch.stack([view["pixel_values"] for view in views]),
            "time_ids": views[0]["time_ids"],
        }


class LatentData(Dataset[dict[str, Any]]):
    """The samples of a `TextToImageData`, already encoded: what a `Encoder` makes of a batch of them.

    Args:
        data: What was written to the cache; it draws each sample's flip and caption.
        cache: Where it was written.
    """

    def __init__(self, data: TextToImageData, cache: LatentCache) -> None:
        self.data = data
        self.cache = cache

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, seed = self.data.indices[key[0]], key[1]
        flip, caption = self.data.draw_flip(seed), self.data.draw_caption(index, seed)
        path = self.cache.path(index)
        with open_tensors(path) as file:
            image = {name: file.get_slice(name)[int(flip)] for name in LATENTS}
            image["time_ids"] = file.get_tensor("time_ids")
        text = _read_text(self.cache.folder / EMPTY_CAPTION, 0) if caption is None else _read_text(path, caption)
        return {"seeds": seed, **image, **text}


def _read_text(path: Path, row: int) -> dict[str, torch.Tensor]:
    """The text of one caption: whatever a file holds beside the image."""
    with open_tensors(path) as file:
        names = set(file.keys()) - {*LATENTS, "time_ids"}
        return {name: file.get_slice(name)[row] for name in names}

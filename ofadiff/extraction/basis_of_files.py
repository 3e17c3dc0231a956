"""The supernet's basis in the files of an extracted model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ofadiff.basis.change import BASIS_NAME, load_basis
from ofadiff.reading.tensors import open_tensors
from ofadiff.storage.files import weight_files

# Before the names of the basis' tensors among a model's weights.
BASIS_PREFIX = "ofa_basis."


def read_basis(
    name_or_path: str | Path, subfolder: str | None = None, variant: str | None = None, **kwargs: Any
) -> dict[str, torch.Tensor] | None:
    """The basis in a model's files, on disk or in the hub's cache; None if they hold none.

    It lies among the weights, because that is what diffusers fetches from the hub; once it was a file of its own.
    """
    folder = Path(name_or_path) / (subfolder or "")
    if not Path(name_or_path).is_dir():
        index = _fetch(name_or_path, _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant), subfolder, kwargs)
        file = index or _fetch(name_or_path, _add_variant(SAFETENSORS_WEIGHTS_NAME, variant), subfolder, kwargs)
        own = _fetch(name_or_path, BASIS_NAME, subfolder, kwargs)
        if file is None and own is None:
            return None
        folder = (file or own).parent  # type: ignore[union-attr]
    for file in _files_of(folder, variant) or _files_of(folder, None):
        with open_tensors(file) as weights:
            found = [key for key in weights.keys() if key.startswith(BASIS_PREFIX)]  # noqa: SIM118
            if found:
                return {key.removeprefix(BASIS_PREFIX): weights.get_tensor(key).clone() for key in found}
    return load_basis(folder) if (folder / BASIS_NAME).is_file() else None


def _fetch(name: str | Path, file: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a hub repository in the cache; None if the repository has none of that name."""
    keys = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    options = {key: kwargs[key] for key in keys if kwargs.get(key) is not None}
    try:
        return Path(hf_hub_download(str(name), file, subfolder=subfolder, **options))
    except EntryNotFoundError:
        return None


def _files_of(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a model's variant, or none."""
    try:
        return list(weight_files(folder, variant))
    except FileNotFoundError:
        return []

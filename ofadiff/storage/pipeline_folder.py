"""Folders of pipelines with a supernet in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
)
from huggingface_hub import snapshot_download

from ofadiff.basis.change import BASIS_NAME
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.ofa_config import ADAPTERS_NAME


def find_denoiser(directory: str | Path) -> str:
    """Name of the component in a pipeline folder that is a supernet.

    Raises:
        ValueError: If the folder is no diffusers pipeline, or none of its components is a supernet.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise ValueError(f"{directory} holds no model_index.json, so it is no diffusers pipeline folder")
    index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    for component in index:
        if (directory / component / CONFIG_NAME).is_file():
            return component
    raise ValueError(
        f"{directory} holds no {CONFIG_NAME} in any component, so it is no OFA checkpoint; `ofadiff compress` makes one"
    )


def local_folder(name_or_path: str | Path, kwargs: dict[str, Any]) -> Path:
    """An OFA checkpoint's folder; that of a hub repository is downloaded, as `from_pretrained`'s arguments say.

    Raises:
        ValueError: If it is neither a folder nor the name of a repository.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name_or_path)):
        raise ValueError(f"{name_or_path} is neither a folder nor the name of a hub repository")
    shared = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    options = {key: kwargs[key] for key in shared if key in kwargs}
    for_pipeline = {key: kwargs[key] for key in ("proxies", "variant") if key in kwargs}
    folder = DiffusionPipeline.download(str(name_or_path), **options, **for_pipeline)
    # diffusers fetches the files that it knows; the supernet's own lie in the same snapshot.
    own_files = [f"*/{CONFIG_NAME}", f"*/{BASIS_NAME}", f"*/{ADAPTERS_NAME}/*/*"]
    snapshot_download(str(name_or_path), allow_patterns=own_files, **options)
    return Path(folder)

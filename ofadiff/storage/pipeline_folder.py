"""Folders of pipelines with a supernet in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
)
from huggingface_hub import snapshot_download

from ofadiff.basis.change import BASIS_NAME
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.ofa_config import ADAPTERS_NAME, read_ofa_config
from ofadiff.storage.pipeline_index import read_index


def find_denoisers(directory: str | Path) -> tuple[str, ...]:
    """Names of the components in a pipeline folder that are supernets; they have the same sizes.

    Raises:
        ValueError: If the folder is no diffusers pipeline, none of its components is a supernet, or they differ in
            their sizes.
    """
    directory = Path(directory)
    index = read_index(directory)
    found = tuple(component for component in index if (directory / component / CONFIG_NAME).is_file())
    if not found:
        raise ValueError(
            f"{directory} holds no {CONFIG_NAME} in any component, so it is no OFA checkpoint; `ofadiff compress` "
            "makes one"
        )
    sizes = [SizeTable.from_dict(read_ofa_config(directory / component)).sizes for component in found]
    for component, own in zip(found, sizes, strict=True):
        if own != sizes[0]:
            raise ValueError(f"the {component} of {directory} has sizes {own}, its {found[0]} {sizes[0]}; they differ")
    return found


def find_denoiser(directory: str | Path, component: str | None = None) -> str:
    """Name of the component in a pipeline folder that is a supernet; of several the one that is meant.

    Args:
        directory: The pipeline folder.
        component: What the pipeline calls it; needed where there are several.

    Raises:
        ValueError: As `find_denoisers`; or if the component is none of them, or is not said.
    """
    found = find_denoisers(directory)
    if component is None and len(found) > 1:
        raise ValueError(f"{directory} has sizes of {' and '.join(found)}; say which one with component")
    if component is not None and component not in found:
        raise ValueError(f"the {component} of {directory} has no sizes; its {' and '.join(found)} has")
    return found[0] if component is None else component


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
    folder = DiffusionPipeline.download(str(name_or_path), use_safetensors=True, **options, **for_pipeline)
    # diffusers fetches the files that it knows; the supernet's own lie in the same snapshot.
    download_own_files(str(name_or_path), **options)
    return Path(folder)


def download_own_files(name: str, **options: Any) -> Path:
    """What a hub repository has beside the files of diffusers, if it is an OFA checkpoint; returns its snapshot."""
    own_files = [f"*/{CONFIG_NAME}", f"*/{BASIS_NAME}", f"*/{ADAPTERS_NAME}/*/*"]
    return Path(snapshot_download(name, allow_patterns=own_files, **options))

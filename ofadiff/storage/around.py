"""Pipeline folders: a pipeline that is saved around another denoiser, or copied."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ofadiff.reading.names import check_links
from ofadiff.reading.tensors import open_tensors
from ofadiff.storage.pipeline_index import read_index
from ofadiff.storage.split import class_of

# Weights that a copy leaves out: of a variant (`model.fp16.safetensors`), and in other formats.
OTHER_WEIGHTS = re.compile(
    r"(model\.(?!safetensors|bin)[^.]+\.(safetensors|bin))|(\.index\.[^.]+\.json)|(\.(bin|bin\.index\.json|msgpack|ckpt|h5|onnx))$"
)


def save_around(
    denoiser_name: str,
    denoiser: ModelMixin,
    folder: Path,
    out: Path,
    variant: str | None = None,
    is_main_process: bool = True,
) -> None:
    """Writes the original pipeline with another denoiser; every other component stays what it was, byte for byte.

    Where that cannot be (files of a variant), it is loaded in the dtype that it is stored in and saved.

    Args:
        denoiser_name: The component that is replaced.
        denoiser: What takes its place.
        folder: Folder of the original pipeline.
        out: To write to.
        variant: Variant of the original's files.
        is_main_process: Whether this process writes. All call this where the denoiser's weights are split over them.
    """
    index = read_index(folder)
    denoiser.save_pretrained(out / denoiser_name, is_main_process=is_main_process)
    if not is_main_process:
        return
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name != denoiser_name]
    for name in parts:
        weights = [path for path in (folder / name).glob("*") if path.suffix == ".safetensors"]
        plain = [path for path in weights if not OTHER_WEIGHTS.search(path.name)]
        if not weights or (variant is None and plain):
            copy_component(folder / name, out / name)
        else:
            others = {other: None for other in index if isinstance(index[other], list) and other != name}
            pipeline = DiffusionPipeline.from_pretrained(folder, variant=variant, use_safetensors=True, **others)
            loaded = [path for path in weights if variant and re.search(rf"\.{re.escape(variant)}[.-]", path.name)]
            torch.nn.Module.to(pipeline.components[name], stored_dtype(loaded or plain)).save_pretrained(out / name)
    own = class_of(denoiser)
    index[denoiser_name] = [own.__module__.partition(".")[0], own.__name__]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_component(folder: Path, out: Path) -> None:
    """Copies a component's folder, without weights of variants and of other formats than safetensors.

    Raises:
        ValueError: If it has links to what is not the pipeline's.
    """
    check_links(folder.parent)
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        known = OTHER_WEIGHTS.search(path.name) is None and not path.name.startswith(".")
        if path.is_file() and known:
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def stored_dtype(weights: Sequence[Path]) -> torch.dtype:
    """The floating-point dtype of weights in safetensors files; float32 where there are none."""
    for path in weights:
        with open_tensors(path) as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return torch.float32


def copy_pipeline(folder: Path, out: Path) -> None:
    """Copies a pipeline's components; `model_index.json` comes last, so a killed copy is none.

    Raises:
        ValueError: If it has links to what is not the pipeline's.
    """
    check_links(folder)
    components = read_index(folder)
    for component in components:
        if (folder / component).is_dir():
            shutil.copytree(folder / component, out / component, dirs_exist_ok=True)
    shutil.copy2(folder / "model_index.json", out / "model_index.json")

"""`ofa_config.json` and the `config.json` beside it, of a supernet's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open

from ofadiff.size_schedule import SizeSchedule
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.files import weight_files
from ofadiff.storage.model_classes import model_class

FORMAT_VERSION = 1

# What the very first checkpoints of this version call their groups.
FIRST_GROUPS = "ofadiff_groups"

# The folder of the adapters of sizes, beside it.
ADAPTERS_NAME = "ofa_adapters"


def read_ofa_config(directory: str | Path) -> dict[str, Any]:
    """What `ofa_config.json` in a denoiser's folder says.

    Raises:
        ValueError: If there is none, or it was written in another format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {CONFIG_NAME}, so it is no OFA checkpoint; `ofadiff compress` makes one"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {values.get('format_version')!r}; this ofadiff reads {FORMAT_VERSION}"
        )
    if FIRST_GROUPS in values:
        values["groups"] = values.pop(FIRST_GROUPS)
    return values


def read_schedules(values: Mapping[str, Any], directory: str | Path) -> dict[str, SizeSchedule]:
    """The schedules of sizes that an `ofa_config.json` holds, by their names.

    Raises:
        ValueError: If they are none.
    """
    kept = values.get("schedules", {})
    if not isinstance(kept, Mapping):
        raise ValueError(f"{Path(directory) / CONFIG_NAME} has the schedules {kept!r}; they must be an object")
    try:
        return {name: SizeSchedule.from_dict(schedule) for name, schedule in kept.items()}
    except ValueError as error:
        raise ValueError(f"{Path(directory) / CONFIG_NAME}: {error}") from error


def denoiser_class(directory: str | Path) -> type[ModelMixin]:
    """The class that a denoiser's `config.json` names, of diffusers or of `MODEL_CLASSES`.

    Raises:
        ValueError: If there is no `config.json` or it names no diffusers model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no config.json, so it is no diffusers model")
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    stock = model_class(name)
    if stock is None:
        raise ValueError(
            f"{path} names the class {name!r}, which is no diffusers model; a class of your own has to be in "
            "MODEL_CLASSES of ofadiff.storage.model_classes, or to be given to Supernet.from_pretrained as model="
        )
    return stock


def load_model(directory: str | Path, model: ModelMixin | type[ModelMixin] | None, kwargs: dict[str, Any]) -> Any:
    """The denoiser of a folder at full size, as plain diffusers loads it.

    Args:
        directory: The folder.
        model: Its class, or one of that class that gets the weights; by default the class that `config.json` names.
        kwargs: As in the denoiser's own `from_pretrained`; of a model that is there already, `variant` alone.

    Raises:
        ValueError: If the class is another one than the folder's, weights do not fit, or an argument cannot work.
    """
    if model is None:
        return denoiser_class(directory).from_pretrained(directory, **kwargs)
    named = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("_class_name")
    given: Any = model if isinstance(model, type) else type(model)
    if given.__name__ != named:
        raise ValueError(f"model is of class {given.__name__}; {directory} holds a {named}")
    if given is model:
        return given.from_pretrained(directory, **kwargs)
    others = sorted(kwargs.keys() - {"variant"})
    if others:
        raise ValueError(f"{others[0]} is for a model that is loaded; the one that is given stays as it was built")
    assert isinstance(model, ModelMixin)
    weights: dict[str, torch.Tensor] = {}
    for file, keys in weight_files(Path(directory), kwargs.get("variant")).items():
        with safe_open(file, framework="pt") as opened:
            weights |= {key: opened.get_tensor(key) for key in keys}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {directory} do not fit the model: {error}") from error
    return model.eval()

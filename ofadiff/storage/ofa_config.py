"""`ofa_config.json` and the `config.json` beside it, of a supernet's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.model_classes import model_class

FORMAT_VERSION = 1

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
    return values


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
            "MODEL_CLASSES of ofadiff.storage.model_classes"
        )
    return stock

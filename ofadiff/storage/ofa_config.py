"""`ofa_config.json` and the `config.json` beside it, of a supernet's folder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ofadiff.reading.arguments import check_argument
from ofadiff.reading.json_file import check_object, is_kind, read_object, shown
from ofadiff.reading.tensors import open_tensors
from ofadiff.size_schedule import SizeSchedule
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.files import weight_files
from ofadiff.storage.model_classes import model_class
from ofadiff.storage.strangers import check_model, forbid_pickles

FORMAT_VERSION = 1

# What it must say, and what it may; of each subnet too.
KEYS = {"groups": list, "subnets": list, "budget": str, "min_keep": float, "full_params": int, "provenance": dict}
OPTIONAL_KEYS = {"full_macs": int, "full_latency_ms": float, "processor": str, "schedules": dict, "ofa_structure": str}
SUBNET = {"size": float, "widths": dict, "params": int}
OPTIONAL_OF_SUBNET = {"macs": int, "latency_ms": float}

# What a size may be a fraction of.
BUDGETS = ("params", "macs", "latency", "channels")

# What the very first checkpoints of this version call their groups.
FIRST_GROUPS = "ofadiff_groups"

# The folder of the adapters of sizes, beside it.
ADAPTERS_NAME = "ofa_adapters"


def read_ofa_config(directory: str | Path) -> dict[str, Any]:
    """What `ofa_config.json` in a denoiser's folder says.

    Raises:
        ValueError: If there is none, it was written in another format, or says what cannot be: of its keys, the sizes,
            or widths that do not nest.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {CONFIG_NAME}, so it is no OFA checkpoint; `ofadiff compress` makes one"
        )
    values = read_object(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {values.get('format_version')!r}; this ofadiff reads {FORMAT_VERSION}"
        )
    if FIRST_GROUPS in values:
        values["groups"] = values.pop(FIRST_GROUPS)
    check_object(values, str(path), KEYS, OPTIONAL_KEYS)
    for number, group in enumerate(values["groups"], 1):
        check_object(group, f"group {number} of {path}", {"name": str, "width": int})
    _check_subnets(values, path)
    return values


def _check_subnets(values: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError unless there are sizes, ascending, each with widths that its groups have and that nest."""
    budget, subnets = values["budget"], values["subnets"]
    if budget not in BUDGETS:
        raise ValueError(f"{path} has the budget {shown(budget)}; it must be one of {', '.join(BUDGETS)}")
    if not (0 <= values["min_keep"] <= 1 and values["full_params"] > 0):
        raise ValueError(
            f"{path} has min_keep {shown(values['min_keep'])} and full_params {shown(values['full_params'])}; they "
            "must be a share in [0, 1] and a number above 0"
        )
    if not subnets:
        raise ValueError(f"{path} has no subnets; it must have at least one")
    full = {group["name"]: group["width"] for group in values["groups"]}
    for number, subnet in enumerate(subnets, 1):
        where = f"subnet {number} of {path}"
        check_object(subnet, where, SUBNET, OPTIONAL_OF_SUBNET)
        unknown = sorted(subnet.keys() - SUBNET.keys() - OPTIONAL_OF_SUBNET.keys())
        if unknown:
            raise ValueError(f"{where} has the key {shown(unknown[0])}, which this ofadiff does not know")
        if not (0 < subnet["size"] <= 1 and subnet["params"] > 0):
            raise ValueError(
                f"{where} has size {shown(subnet['size'])} and params {shown(subnet['params'])}; they must be a "
                "fraction in (0, 1] and a number above 0"
            )
        others = sorted(subnet["widths"].keys() ^ full.keys())
        if others:
            raise ValueError(f"{where} has widths for other groups than the file: {shown(others[0])} is in one of them")
        for name, width in subnet["widths"].items():
            if not (is_kind(width, int) and 0 <= width <= full[name]):
                raise ValueError(
                    f"{where} has the width {shown(width)} for {name}; it must be a whole number from 0 to {full[name]}"
                )
    for smaller, larger in itertools.pairwise(subnets):
        if smaller["size"] >= larger["size"]:
            raise ValueError(f"{path} has the size {smaller['size']:g} before {larger['size']:g}; they must ascend")
        for name, width in smaller["widths"].items():
            if width > larger["widths"][name]:
                raise ValueError(
                    f"{path} has width {width} for {name} at size {smaller['size']:g} and {larger['widths'][name]} at "
                    f"{larger['size']:g}; widths must nest"
                )


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
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(directory) / CONFIG_NAME}: {error}") from error


def denoiser_class(directory: str | Path) -> type[ModelMixin]:
    """The class that a denoiser's `config.json` names, of diffusers or of `MODEL_CLASSES`.

    Raises:
        ValueError: If there is no `config.json` or it names no diffusers model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no config.json, so it is no diffusers model")
    name = read_object(path).get("_class_name")
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
    forbid_pickles(kwargs)
    kwargs = {**kwargs, "use_safetensors": True}
    if model is None:
        stock = denoiser_class(directory)
        check_model(directory, stock, kwargs.get("variant"))
        return stock.from_pretrained(directory, **kwargs)
    named = read_object(Path(directory) / "config.json").get("_class_name")
    given: Any = model if isinstance(model, type) else type(model)
    check_argument("model", model, issubclass(given, ModelMixin), "a denoiser of diffusers' kind, or its class")
    if given.__name__ != named:
        raise ValueError(f"model is of class {given.__name__}; {directory} holds a {named}")
    if given is model:
        check_model(directory, given, kwargs.get("variant"))
        return given.from_pretrained(directory, **kwargs)
    others = sorted(kwargs.keys() - {"variant", "use_safetensors"})
    if others:
        raise ValueError(f"{others[0]} is for a model that is loaded; the one that is given stays as it was built")
    assert isinstance(model, ModelMixin)
    weights: dict[str, torch.Tensor] = {}
    for file, keys in weight_files(Path(directory), kwargs.get("variant")).items():
        with open_tensors(file) as opened:
            weights |= {key: opened.get_tensor(key) for key in keys}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {directory} do not fit the model: {error}") from error
    return model.eval()

"""The adapter of one size: a LoRA that was trained on that subnet, extracted, and belongs to no other size.

On disk it is what peft writes, `adapter_config.json` and `adapter_model.safetensors`, in a folder per size beside the
denoiser's weights: `unet/ofa_adapters/0.5/`. Those weights stay what they are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file

from ofadiff.layers import LowRankUpdate
from ofadiff.reading.json_file import check_object, read_object
from ofadiff.reading.names import check_stays
from ofadiff.reading.tensors import read_tensors
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.files import written_aside
from ofadiff.storage.ofa_config import ADAPTERS_NAME, read_ofa_config

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# What peft puts before the names of modules in its files.
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

# Where peft leaves the base weights alone; its other ways to begin replace them.
INITIALISATIONS = (True, False, "gaussian")


@dataclass(frozen=True)
class SizeAdapter:
    """A plain LoRA of an extracted model.

    Attributes:
        config: What peft's `adapter_config.json` holds.
        updates: What it adds to a layer, by the layer's name.

    Example:
        >>> small = supernet.extract(0.5)
        >>> inject_adapter_in_model(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v"]), small)
        >>> ...  # train it as any diffusers model
        >>> supernet.set_size_adapter(0.5, SizeAdapter.from_model(small))
    """

    config: dict[str, Any]
    updates: dict[str, LowRankUpdate]

    @classmethod
    def from_model(cls, model: ModelMixin, adapter_name: str = "default") -> SizeAdapter:
        """A copy of the LoRA that peft has put into an extracted model.

        Raises:
            ValueError: If there is no such adapter, or it is no plain LoRA.
        """
        from peft.utils import get_peft_model_state_dict  # peft is needed for training only

        adapters = getattr(model, "peft_config", {})  # peft gives a model this with its first adapter
        if adapter_name not in adapters:
            raise ValueError(f"the model has no adapter {adapter_name!r}; it has {', '.join(adapters) or 'none'}")
        values = {**adapters[adapter_name].to_dict(), "inference_mode": True}
        config = json.loads(json.dumps(values, default=sorted, sort_keys=True))  # its sets become lists
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
        return cls.from_state_dict(config, {key: tensor.detach().clone() for key, tensor in state_dict.items()})

    @classmethod
    def from_state_dict(cls, config: dict[str, Any], state_dict: Mapping[str, torch.Tensor]) -> SizeAdapter:
        """An adapter in peft's format.

        Args:
            config: peft's `LoraConfig` as a dict.
            state_dict: `<module>.lora_A.weight`, `(rank, in, …)`, and `<module>.lora_B.weight`, `(out, rank, …)`.

        Raises:
            ValueError: If it is no plain LoRA.
        """
        check_object(config, "an adapter's config", {"peft_type": str, "lora_alpha": float})
        plain = config["peft_type"] == "LORA" and not config.get("alpha_pattern")
        if not plain or config.get("init_lora_weights", True) not in INITIALISATIONS:
            raise ValueError(
                f"the adapter is a {config['peft_type']} with alpha_pattern {config.get('alpha_pattern')} and "
                f"init_lora_weights {config.get('init_lora_weights')!r}; a size takes a plain LoRA, one alpha for all "
                f"layers, begun with init_lora_weights {', '.join(map(repr, INITIALISATIONS))}"
            )
        names = [key.removesuffix(DOWN) for key in state_dict if key.endswith(DOWN)]
        unknown = set(state_dict) - {name + side for name in names for side in (DOWN, UP)}
        if unknown or not names:
            raise ValueError(f"the adapter has {min(unknown, default='no weights')!r}; a size takes a plain LoRA")
        updates = {}
        for name in names:
            down, up = state_dict[name + DOWN], state_dict.get(name + UP)
            fits = up is not None and min(down.ndim, up.ndim) >= 2 and down.shape[0] == up.shape[1] > 0
            if up is None or not fits:
                shapes = f"{tuple(down.shape)} and {None if up is None else tuple(up.shape)}"
                raise ValueError(f"the adapter has weights of shapes {shapes} for {name}; they must share their rank")
            rank = down.shape[0]
            scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            updates[name] = LowRankUpdate(down, up, scaling)
        return cls(config, updates)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SizeAdapter:
        """Reads `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            FileNotFoundError: If one of them is missing.
            ValueError: If it is no plain LoRA.
        """
        config = read_object(Path(directory) / ADAPTER_CONFIG_NAME)
        state_dict = read_tensors(Path(directory) / ADAPTER_WEIGHTS_NAME)
        return cls.from_state_dict(config, {key.removeprefix(PREFIX): value for key, value in state_dict.items()})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """As `from_state_dict` takes it."""
        tensors: dict[str, torch.Tensor] = {}
        for name, update in self.updates.items():
            tensors |= {name + DOWN: update.down, name + UP: update.up}
        return tensors

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what peft would: `PeftModel.from_pretrained(extracted_model, directory)` reads it too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        save_file(tensors, directory / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (directory / ADAPTER_CONFIG_NAME).write_text(text, encoding="utf-8")

    @torch.no_grad()
    def merge_into(self, model: ModelMixin) -> None:
        """Adds it to the weights of the extracted model that it belongs to, in place.

        Raises:
            ValueError: If the model has no such layer, or one of other shape.
        """
        modules = dict(model.named_modules())
        for name, update in self.updates.items():
            weight = modules[name].weight if name in modules else None
            found = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
            if not isinstance(weight, torch.Tensor) or update.shape != found:
                raise ValueError(
                    f"the adapter has an update of shape {update.shape} for {name}, whose weight is {found}"
                )
            weight.copy_(update.add_to(weight))


def tensors_of(adapter: SizeAdapter | None) -> dict[str, torch.Tensor]:
    """What tells an adapter from others: its matrices and their scales; nothing if there is none."""
    if adapter is None:
        return {}
    scales = {f"{name}.scaling": torch.tensor(update.scaling) for name, update in adapter.updates.items()}
    return {**dict(sorted(adapter.state_dict().items())), **dict(sorted(scales.items()))}


def adapter_folder(directory: str | Path, size: float) -> Path:
    """Where a denoiser's folder holds the adapter of a size, if it has one."""
    return Path(directory) / ADAPTERS_NAME / str(float(size))


def save_size_adapter(adapter: SizeAdapter, directory: str | Path, size: float) -> None:
    """Puts a size's adapter into a denoiser's folder, in place of the one that the size had; nothing else changes.

    A kill leaves whole adapters only.
    """
    check_stays(adapter_folder(directory, size), Path(directory))
    with written_aside(adapter_folder(directory, size)) as folder:
        adapter.save_pretrained(folder)


def save_size_adapters(adapters: Mapping[float, SizeAdapter], directory: str | Path) -> None:
    """Makes a denoiser's folder hold these adapters and no others; a kill takes away none that stays."""
    check_stays(Path(directory) / ADAPTERS_NAME, Path(directory))
    for size, adapter in adapters.items():
        save_size_adapter(adapter, directory, size)
    kept = {adapter_folder(directory, size) for size in adapters}
    for old in set((Path(directory) / ADAPTERS_NAME).glob("*")) - kept:
        shutil.rmtree(old)


def load_size_adapter(directory: str | Path, size: float) -> SizeAdapter | None:
    """The adapter of a size in a denoiser's folder, or None if it has none.

    Raises:
        FileNotFoundError: If one of its files is missing.
        ValueError: If it is no plain LoRA.
    """
    folder = adapter_folder(directory, size)
    return SizeAdapter.from_pretrained(folder) if folder.is_dir() else None


def load_largest_adapter(directory: str | Path, whole: bool = False) -> SizeAdapter | None:
    """The adapter of a denoiser at its largest size: None if it has none, or no sizes at all.

    Args:
        directory: The denoiser's folder.
        whole: None as well if that size is cut, so that the adapter does not fit the whole weights.

    Raises:
        FileNotFoundError: If one of its files is missing.
        ValueError: If it is no plain LoRA.
    """
    if not (Path(directory) / CONFIG_NAME).is_file():
        return None
    subnets = SizeTable.from_dict(read_ofa_config(Path(directory)))
    if whole and not subnets.has_whole:
        return None
    return load_size_adapter(directory, subnets.sizes[-1])


def load_size_adapters(directory: str | Path, sizes: Sequence[float]) -> dict[float, SizeAdapter]:
    """The adapters of all sizes in a denoiser's folder.

    Raises:
        FileNotFoundError: If a file of an adapter is missing.
        ValueError: If there is one of a size that is none of `sizes`, or one that is no plain LoRA.
    """
    folder = Path(directory) / ADAPTERS_NAME
    found = {path.name for path in folder.glob("[!.]*")}
    unknown = found - {str(float(size)) for size in sizes}
    if unknown:
        raise ValueError(f"{folder} has {min(unknown)}, but the sizes are {', '.join(f'{size:g}' for size in sizes)}")
    loaded = {size: load_size_adapter(directory, size) for size in sizes}
    return {size: adapter for size, adapter in loaded.items() if adapter is not None}

"""Extracted models: a subnet as a smaller dense diffusers model that stands alone.

`OFA<DiffusersClass>` is a subclass of the stock class whose config carries the widths: it is built empty by the stock
class, shrunk, and then loaded from safetensors like any diffusers model.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, convert_unet_state_dict_to_peft
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from ofadiff.basis import BASIS_NAME, load_basis, save_basis
from ofadiff.channels import ChannelGroup, Kept, active_part, check_widths, read_active_part
from ofadiff.elastic import kept_by_module, shrink_model
from ofadiff.size_adapter import load_size_adapter
from ofadiff.sizes import CONFIG_NAME, Subnet
from ofadiff.unet_elastic import find_channel_groups

# Key of the widths in an extracted model's config.json.
WIDTHS_KEY = "ofa_widths"

PREFIX = "OFA"

# What was read of a file stays resident while it is open, and opening it takes a millisecond or two.
TENSORS_PER_OPENING = 16


class ExtractedModel:
    """What an extracted model adds to its stock class: its config carries the units that every group keeps."""

    # The supernet's basis, if the model came out of one; adapters of the original model pass through it.
    ofa_basis: dict[str, torch.Tensor] | None = None
    _stock_class: type[ModelMixin]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in the stock class; the basis is read too, where the folder has one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        file = _basis_file(pretrained_model_name_or_path, **kwargs)
        model.ofa_basis = None if file is None else load_basis(file.parent)
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in the stock class, with the basis beside the weights.

        Raises:
            ValueError: If the folder holds a supernet, which this would destroy.
        """
        if (Path(save_directory) / CONFIG_NAME).exists():
            raise ValueError(f"{save_directory} holds a supernet; save the extracted model in another folder")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if self.ofa_basis is not None:
            save_basis(self.ofa_basis, save_directory)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> Any:
        """Loads a LoRA of the original model: it acts as the original with the LoRA fused, cut to this size.

        Raises:
            ValueError: If the adapter is no dict of tensors, no plain LoRA, or the model has lost its basis.
        """
        from ofadiff.adapters import convert_lora_state_dict  # peft is needed for adapters only

        if not isinstance(pretrained_model_name_or_path_or_dict, dict):
            raise ValueError("an extracted model takes a LoRA as a state dict; load it with load_lora_weights()")
        if self.ofa_basis is None:
            raise ValueError(f"this model was saved without {BASIS_NAME}, so no LoRA of the original can be converted")
        dotted = "" if prefix is None else f"{prefix}."
        adapter = {
            key.removeprefix(dotted): tensor
            for key, tensor in pretrained_model_name_or_path_or_dict.items()
            if key.startswith(dotted)
        }
        if adapter and not any("lora_A" in key for key in adapter):
            adapter = convert_unet_state_dict_to_peft(adapter)
        stock, widths = self._stock_class, self.config[WIDTHS_KEY]  # type: ignore[attr-defined]
        groups = _groups_of(stock, self.config, widths)  # type: ignore[attr-defined]
        adapter = convert_lora_state_dict(adapter, groups, widths, self.ofa_basis)
        adapter = {f"{dotted}{key}": tensor for key, tensor in adapter.items()}
        with warnings.catch_warnings():
            # peft gives a LoRA to layers of dropped branches too, which have nothing to initialise.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            return super().load_lora_adapter(adapter, prefix=prefix, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Builds the stock model and shrinks it to the widths in the config.

        Raises:
            ValueError: If the config carries no widths, or widths that do not fit the model's channel groups.
        """
        if isinstance(config, (str, Path)):
            config = cls.load_config(config)  # type: ignore[attr-defined]
        config = dict(config)
        if WIDTHS_KEY not in config:
            stock = cls.__name__.removeprefix(PREFIX)
            raise ValueError(f"the config has no {WIDTHS_KEY!r}, so it is no extracted model; load it as {stock}")
        widths = config.pop(WIDTHS_KEY)
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        # Groups that the supernet left out stay at full width.
        groups = [group for group in find_channel_groups(model) if group.name in widths]
        check_widths(groups, widths)
        shrink_model(model, groups, widths)
        model.register_to_config(**{WIDTHS_KEY: widths})
        return (model, unused) if return_unused_kwargs else model


@functools.cache
def extracted_class(stock: type[ModelMixin]) -> type[ModelMixin]:
    """The class of the extracted models of a diffusers denoiser class, `OFA<DiffusersClass>`."""
    namespace = {"__module__": "ofadiff", "__doc__": stock.__doc__, "_stock_class": stock}
    return type(f"{PREFIX}{stock.__name__}", (ExtractedModel, stock), namespace)


def extracted_class_by_name(name: str) -> type[ModelMixin]:
    """`OFAUNet2DModel` and the like: what diffusers looks up in `ofadiff` when it loads an extracted model.

    Raises:
        AttributeError: If there is no diffusers model of that name.
    """
    stock = getattr(diffusers, name.removeprefix(PREFIX), None)
    if not (name.startswith(PREFIX) and isinstance(stock, type) and issubclass(stock, ModelMixin)):
        raise AttributeError(f"module 'ofadiff' has no attribute {name!r}")
    return extracted_class(stock)  # type: ignore[arg-type]


def empty_extracted_model(stock: type[ModelMixin], config: dict[str, Any], widths: dict[str, int]) -> ModelMixin:
    """An extracted model in eval mode whose parameters are on the meta device, its buffers made."""
    cls = extracted_class(stock)  # type: ignore[arg-type]
    with init_empty_weights(include_buffers=False):
        return cls.from_config({**config, "_class_name": cls.__name__, WIDTHS_KEY: dict(widths)}).eval()


@torch.no_grad()
def extract(
    model: ModelMixin, groups: Sequence[ChannelGroup], widths: dict[str, int], basis: dict[str, torch.Tensor]
) -> ModelMixin:
    """Cuts a subnet out of the full weights.

    Args:
        model: The denoiser with its full parameters, elastic or stock; unchanged.
        groups: Its channel groups.
        widths: Units that every group keeps.
        basis: That the full weights are in.

    Returns:
        A stand-alone copy in eval mode, of class `OFA<DiffusersClass>`, with `model`'s device, dtype and memory format.

    Raises:
        ValueError: If the weights are not there, because they are offloaded.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model's weights are offloaded; extract before offloading, or load with size= instead")
    small = empty_extracted_model(type(model), dict(model.config), widths)
    kept = kept_by_module(groups, widths)
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, name = key.rpartition(".")
        state[key] = active_part(tensor, name, kept.get(module, ())).clone()
    small.load_state_dict(state, assign=True, strict=True)
    # Buffers that no state dict holds were made on the CPU, in float32.
    buffers = dict(model.named_buffers())
    for name, buffer in small.named_buffers():
        buffer.data = buffers[name].detach().clone()
    small.ofa_basis = dict(basis)
    return small


def load_extracted(
    directory: str | Path,
    stock: type[ModelMixin],
    subnet: Subnet,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> ModelMixin:
    """Loads one subnet out of a supernet's folder, reading only the part of every weight that it keeps.

    If the folder has an adapter of its size, that is merged.

    Args:
        directory: Folder of the denoiser, as `Supernet.save_pretrained` wrote it.
        stock: Class of the denoiser.
        subnet: Which one.
        torch_dtype: Dtype of the parameters; float32 unless it is a `torch.dtype`, as in diffusers.
        variant: Variant of the weight files, such as `"fp16"`.

    Returns:
        The extracted model, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If the folder holds no safetensors weights of that variant.
    """
    directory, widths = Path(directory), subnet.widths
    small = empty_extracted_model(stock, stock.load_config(directory), widths)
    kept = kept_by_module(_groups_of(stock, stock.load_config(directory), widths), widths)
    adapter = load_size_adapter(directory, subnet.size)
    dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else torch.float32
    state: dict[str, torch.Tensor] = {}
    for file, keys in _weight_files(directory, variant).items():
        for start in range(0, len(keys), TENSORS_PER_OPENING):
            state |= _read_parts(file, keys[start : start + TENSORS_PER_OPENING], kept, dtype)
    small.load_state_dict(state, assign=True, strict=True)
    if adapter is not None:
        adapter.merge_into(small)
    small.ofa_basis = load_basis(directory)
    for buffer in small.buffers():
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    return small


def _read_parts(
    file: Path, keys: Sequence[str], kept: Mapping[str, Kept], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a subnet keeps of some tensors in a file, copied: views would keep the file mapped."""
    parts = {}
    with safe_open(file, framework="pt") as weights:
        for key in keys:
            module, _, name = key.rpartition(".")
            if kept.get(module):
                parts[key] = read_active_part(weights.get_slice(key), name, kept[module], dtype)
            else:
                tensor = weights.get_tensor(key)
                parts[key] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return parts


def _groups_of(stock: type[ModelMixin], config: Any, widths: Mapping[str, int]) -> list[ChannelGroup]:
    """The channel groups that `widths` names, of the full-size model of a config."""
    with init_empty_weights(include_buffers=False):
        groups = find_channel_groups(stock.from_config(config))
    return [group for group in groups if group.name in widths]


def _weight_files(directory: Path, variant: str | None) -> dict[Path, list[str]]:
    """The safetensors files of a model, each with the keys of the tensors to read from it."""
    index = directory / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        files: dict[Path, list[str]] = {}
        for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(directory / name, []).append(key)
        return files
    single = directory / _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    if not single.is_file():
        raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}")
    with safe_open(single, framework="pt") as weights:
        return {single: list(weights.keys())}


def _basis_file(name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any) -> Path | None:
    """Where a model's basis lies, on disk or in the hub's cache; None if it has none."""
    if Path(name_or_path).is_dir():
        file = Path(name_or_path) / (subfolder or "") / BASIS_NAME
        return file if file.is_file() else None
    keys = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    options = {key: kwargs[key] for key in keys if kwargs.get(key) is not None}
    try:
        return Path(hf_hub_download(str(name_or_path), BASIS_NAME, subfolder=subfolder, **options))
    except EntryNotFoundError:
        return None

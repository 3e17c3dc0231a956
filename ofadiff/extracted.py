"""Extracted models: a subnet as a smaller dense diffusers model that stands alone.

`OFA<DiffusersClass>` is a subclass of the stock class whose config carries the widths: it is built empty by the stock
class, shrunk, and then loaded from safetensors like any diffusers model.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, convert_unet_state_dict_to_peft
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from ofadiff.basis import BASIS_NAME, load_basis
from ofadiff.channels import ChannelGroup, Kept, active_part, check_widths, read_active_part
from ofadiff.elastic import kept_by_module, shrink_model
from ofadiff.files import add_to_safetensors, weight_files
from ofadiff.hub import upload
from ofadiff.refusals import refusals
from ofadiff.size_adapter import load_size_adapter
from ofadiff.sizes import CONFIG_NAME, Subnet
from ofadiff.stand_in import StandIn, stock_class
from ofadiff.structure import check_fingerprints, check_structure
from ofadiff.unet_elastic import find_channel_groups

# Key of the widths in an extracted model's config.json.
WIDTHS_KEY = "ofa_widths"

PREFIX = "OFA"

# Before the names of the basis' tensors among a model's weights.
BASIS_PREFIX = "ofa_basis."

# What was read of a file stays resident while it is open, and opening it takes a millisecond or two.
TENSORS_PER_OPENING = 16


class ExtractedModel:
    """What an extracted model adds to its stock class: its config carries the units that every group keeps."""

    # The supernet's basis, if the model came out of one; adapters of the original model pass through it.
    ofa_basis: dict[str, torch.Tensor] | None = None
    _stock_class: type[ModelMixin]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in the stock class; the basis is read too, where the files hold one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.ofa_basis = _read_basis(pretrained_model_name_or_path, **kwargs)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in the stock class; a file of the weights holds the basis too, so that wherever they go it goes along.

        Raises:
            ValueError: If the folder holds a supernet, which this would destroy, or the format is not safetensors.
        """
        folder = Path(save_directory)
        if (folder / CONFIG_NAME).exists():
            raise ValueError(f"{folder} holds a supernet; save the extracted model in another folder")
        if not safe_serialization:
            raise ValueError("safe_serialization=False: an extracted model is saved as safetensors only")
        super().save_pretrained(  # type: ignore[misc]
            folder, is_main_process, save_function, variant=variant, max_shard_size=max_shard_size, **kwargs
        )
        if self.ofa_basis is None:
            (folder / BASIS_NAME).unlink(missing_ok=True)  # that of an earlier model
        elif is_main_process:
            last = next(reversed(weight_files(folder, variant)))
            add_to_safetensors(last, {}, {f"{BASIS_PREFIX}{name}": tensor for name, tensor in self.ofa_basis.items()})
        if push_to_hub:
            upload(self, folder.name, variant, kwargs)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> Any:
        """Loads a LoRA of the original model: it acts as the original with the LoRA fused, cut to this size.

        Raises:
            ValueError: If the adapter is no dict of tensors, no plain LoRA of the original, or the model has lost its
                basis.
        """
        from ofadiff.adapters import convert_lora_state_dict  # peft is needed for adapters only

        if not isinstance(pretrained_model_name_or_path_or_dict, dict):
            raise ValueError("an extracted model takes a LoRA as a state dict; load it with load_lora_weights()")
        if self.ofa_basis is None:
            raise ValueError(
                "the files that this model was loaded from hold no basis of its supernet, so no LoRA of the original "
                "can be converted; extract it anew, and save it with its own save_pretrained()"
            )
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


def extracted_class(cls: type[ModelMixin]) -> type[ModelMixin]:
    """The class of the extracted models of a diffusers denoiser class, `OFA<DiffusersClass>`."""
    return _extracted_class(stock_class(cls))


@functools.cache
def _extracted_class(stock: type[ModelMixin]) -> type[ModelMixin]:
    name = f"{PREFIX}{stock.__name__}"
    namespace = {
        "__module__": "ofadiff",
        "__doc__": stock.__doc__,
        "_stock_class": stock,
        # The basis lies among the weights; diffusers is not to warn of what the model does not take.
        "_keys_to_ignore_on_load_unexpected": [
            *(stock._keys_to_ignore_on_load_unexpected or []),
            rf"^{re.escape(BASIS_PREFIX)}",
        ],
        **refusals(stock, EXTRACTED_REFUSES),
    }
    # diffusers looks up by the class' name how weights of adapters that differ from block to block are meant.
    if stock.__name__ in _SET_ADAPTER_SCALE_FN_MAPPING:
        _SET_ADAPTER_SCALE_FN_MAPPING[name] = _SET_ADAPTER_SCALE_FN_MAPPING[stock.__name__]
    return StandIn(name, (ExtractedModel, stock), namespace)


# Methods of diffusers models that cannot be right on an extracted model, and why.
EXTRACTED_REFUSES = {
    "_load_ip_adapter_weights": "an IP-Adapter works with the original model only, not with an extracted size",
    "load_attn_procs": (
        "attention processors with weights of the original do not fit an extracted size; load LoRAs with "
        "load_lora_weights()"
    ),
}


def extracted_class_by_name(name: str) -> type[ModelMixin]:
    """`OFAUNet2DModel` and the like: what diffusers looks up in `ofadiff` when it loads an extracted model.

    Raises:
        AttributeError: If there is no diffusers model of that name.
    """
    stock = getattr(diffusers, name.removeprefix(PREFIX), None)
    if not (name.startswith(PREFIX) and isinstance(stock, type) and issubclass(stock, ModelMixin)):
        raise AttributeError(f"module 'ofadiff' has no attribute {name!r}")
    return extracted_class(stock)


def empty_extracted_model(stock: type[ModelMixin], config: dict[str, Any], widths: dict[str, int]) -> ModelMixin:
    """An extracted model in eval mode whose parameters are on the meta device, its buffers made."""
    cls = extracted_class(stock)
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
    values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    check_structure(directory, values, variant)
    dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else torch.float32
    with _default_dtype(dtype):
        small = empty_extracted_model(stock, stock.load_config(directory), widths)
    groups = _groups_of(stock, stock.load_config(directory), widths)
    check_fingerprints(groups, values["groups"], directory)
    kept = kept_by_module(groups, widths)
    adapter = load_size_adapter(directory, subnet.size)
    state: dict[str, torch.Tensor] = {}
    for file, keys in weight_files(directory, variant).items():
        for start in range(0, len(keys), TENSORS_PER_OPENING):
            dtypes = {key: _dtype_of(stock, key, dtype) for key in keys[start : start + TENSORS_PER_OPENING]}
            state |= _read_parts(file, dtypes, kept)
    small.load_state_dict(state, assign=True, strict=True)
    if adapter is not None:
        adapter.merge_into(small)
    small.ofa_basis = load_basis(directory)
    return small


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A block in which models make their buffers as diffusers has them made when it loads in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtype_of(stock: type[ModelMixin], key: str, dtype: torch.dtype) -> torch.dtype:
    """That a floating-point parameter gets when diffusers loads the model in `dtype`: some stay in float32."""
    kept = stock._keep_in_fp32_modules or []
    return torch.float32 if set(key.split(".")) & {*([kept] if isinstance(kept, str) else kept)} else dtype


def _read_parts(file: Path, dtypes: Mapping[str, torch.dtype], kept: Mapping[str, Kept]) -> dict[str, torch.Tensor]:
    """What a subnet keeps of some tensors in a file, copied: views would keep the file mapped."""
    parts = {}
    with safe_open(file, framework="pt") as weights:
        for key, dtype in dtypes.items():
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


def _read_basis(
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
        with safe_open(file, framework="pt") as weights:
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

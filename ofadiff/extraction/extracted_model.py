"""Extracted models: a subnet as a smaller dense diffusers model that stands alone.

`OFA<DiffusersClass>` is a subclass of the stock class whose config carries the widths: it is built empty by the stock
class, shrunk, and then loaded from safetensors like any diffusers model.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.utils import convert_unet_state_dict_to_peft

from ofadiff.basis.change import BASIS_NAME
from ofadiff.channels import ChannelGroup, check_widths
from ofadiff.cutting import shrink_model
from ofadiff.extraction.basis_of_files import BASIS_PREFIX, read_basis
from ofadiff.quantized import check_not_quantized
from ofadiff.reading.json_file import is_kind, shown
from ofadiff.sizes import CONFIG_NAME
from ofadiff.stand_ins.equality import StandIn, stock_class
from ofadiff.stand_ins.refusals import check_not_tensor_parallel, refusals
from ofadiff.storage.files import add_to_safetensors, weight_files
from ofadiff.storage.hub import upload
from ofadiff.storage.model_classes import model_class
from ofadiff.storage.strangers import check_model, forbid_pickles
from ofadiff.unet_elastic import find_channel_groups

# Key of the widths in an extracted model's config.json.
WIDTHS_KEY = "ofa_widths"

PREFIX = "OFA"


class ExtractedModel:
    """What an extracted model adds to its stock class: its config carries the units that every group keeps."""

    # The supernet's basis, if the model came out of one; adapters of the original model pass through it.
    ofa_basis: dict[str, torch.Tensor] | None = None
    _stock_class: type[ModelMixin]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in the stock class, from safetensors; the basis is read too, where the files hold one.

        Raises:
            ValueError: If the weights are no safetensors, damaged, or not what `config.json` says.
        """
        forbid_pickles(kwargs)
        if Path(pretrained_model_name_or_path).is_dir():
            folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
            check_model(folder, cls, kwargs.get("variant"))
        kwargs = {**kwargs, "use_safetensors": True}
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.ofa_basis = read_basis(pretrained_model_name_or_path, **kwargs)
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
            ValueError: If the folder holds a supernet, which this would destroy, the format is not safetensors, or the
                weights were quantized past diffusers.
        """
        folder = Path(save_directory)
        if (folder / CONFIG_NAME).exists():
            raise ValueError(f"{folder} holds a supernet; save the extracted model in another folder")
        if not safe_serialization:
            raise ValueError("safe_serialization=False: an extracted model is saved as safetensors only")
        if vars(self).get("hf_quantizer") is None:  # diffusers gives it to a model that it has quantized itself
            check_not_quantized(
                self,  # type: ignore[arg-type]
                "save the model before quantizing it, or load it with quantization_config=TorchAoConfig(…), as which "
                "diffusers can save it",
            )
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

    def enable_parallelism(self, *, config: Any, **kwargs: Any) -> None:
        """As in the stock class, for context parallelism.

        Raises:
            ValueError: If it is tensor parallelism.
        """
        check_not_tensor_parallel(config)
        super().enable_parallelism(config=config, **kwargs)  # type: ignore[misc]

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
        if not (isinstance(widths, dict) and all(is_kind(width, int) for width in widths.values())):
            raise ValueError(f"the config has the {WIDTHS_KEY} {shown(widths)}; they must be whole numbers by group")
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        # Groups that the supernet left out stay at full width.
        groups = [group for group in find_channel_groups(model) if group.name in widths]
        check_widths(groups, widths)
        shrink_model(model, groups, widths)
        model.register_to_config(**{WIDTHS_KEY: widths})
        return (model, unused) if return_unused_kwargs else model


class AdaptableExtractedModel:
    """What an extracted model adds to a stock class that peft's adapters can be put into."""

    config: Any
    ofa_basis: dict[str, torch.Tensor] | None
    _stock_class: type[ModelMixin]

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> Any:
        """Loads a LoRA of the original model: it acts as the original with the LoRA fused, cut to this size.

        Raises:
            ValueError: If the adapter is no dict of tensors, no plain LoRA of the original, or the model has lost its
                basis.
        """
        from ofadiff.adapters.original import convert_lora_state_dict  # peft is needed for adapters only

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
        stock, widths = self._stock_class, self.config[WIDTHS_KEY]
        groups = groups_of(stock, self.config, widths)
        adapter = convert_lora_state_dict(adapter, groups, widths, self.ofa_basis)
        adapter = {f"{dotted}{key}": tensor for key, tensor in adapter.items()}
        with warnings.catch_warnings():
            # peft gives a LoRA to layers of dropped branches too, which have nothing to initialise.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            return super().load_lora_adapter(adapter, prefix=prefix, **kwargs)  # type: ignore[misc]


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
    adapters = (AdaptableExtractedModel,) if issubclass(stock, PeftAdapterMixin) else ()
    return StandIn(name, (ExtractedModel, *adapters, stock), namespace)


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
    stock = model_class(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module 'ofadiff' has no attribute {name!r}")
    return extracted_class(stock)


def empty_extracted_model(stock: type[ModelMixin], config: dict[str, Any], widths: dict[str, int]) -> ModelMixin:
    """An extracted model in eval mode whose parameters are on the meta device, its buffers made."""
    cls = extracted_class(stock)
    with init_empty_weights(include_buffers=False):
        return cls.from_config({**_values(config), "_class_name": cls.__name__, WIDTHS_KEY: dict(widths)}).eval()


def groups_of(stock: type[ModelMixin], config: Any, widths: Mapping[str, int]) -> list[ChannelGroup]:
    """The channel groups that `widths` names, of the full-size model of a config."""
    with init_empty_weights(include_buffers=False):
        groups = find_channel_groups(stock.from_config(_values(config)))
    return [group for group in groups if group.name in widths]


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stock model's config, without the list of values that diffusers leaves to the defaults: positional arguments
    are in it.
    """
    return {name: value for name, value in config.items() if name not in ("_use_default_values", WIDTHS_KEY)}

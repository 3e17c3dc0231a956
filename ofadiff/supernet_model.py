"""What a denoiser that is a supernet knows of itself, whichever pipeline, wrapper or thread it is reached by."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from ofadiff.adapters.loaded import check_is_lora, is_adapted, loaded_adapters, without_offloading
from ofadiff.basis.change import BASIS_NAME
from ofadiff.quantized import check_not_quantized
from ofadiff.reading.arguments import check_path
from ofadiff.reading.tensors import read_metadata
from ofadiff.sizes import CONFIG_NAME
from ofadiff.stand_ins.equality import SupernetType, stock_class
from ofadiff.stand_ins.refusals import check_not_tensor_parallel, refusals
from ofadiff.storage.files import add_to_safetensors, written_aside
from ofadiff.storage.hub import upload
from ofadiff.storage.ofa_config import ADAPTERS_NAME
from ofadiff.storage.structure import STRUCTURE, WEIGHTS, structure_of, structure_of_folder
from ofadiff.supernet_state import SupernetState


class SupernetModel:
    """What a supernet adds to its stock class.

    The denoiser's class is one of these, under the name of the stock class: to diffusers it is that class. So whatever
    is done to the denoiser knows of its sizes: a pipeline of any class saves them, a LoRA of the original is converted,
    a forward in another thread waits until the size is its own again.
    """

    ofa_state: SupernetState | None = None
    _stock_class: type[ModelMixin]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class, hooks and all; in a block of `Supernet.answering` what that makes of it."""
        if torch.compiler.is_compiling():
            return self._call_impl(*args, **kwargs)  # type: ignore[attr-defined]
        state, call = self.ofa_state, super().__call__  # type: ignore[misc]
        if state is None or "_is_replica" in vars(self):
            return call(*args, **kwargs)
        with state.lock:
            return call(*args, **kwargs) if state.answer is None else state.answer(call, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class, at the size that is set.

        Raises:
            ValueError: If the model has an adapter, or fused projections, that do not follow its sizes.
        """
        state = self.ofa_state
        # A replica of `nn.DataParallel` runs in a thread of its own, for the thread that has the model.
        if torch.compiler.is_compiling() or state is None or "_is_replica" in vars(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with state.lock:
            state.check_not_fused()
            for adapter in loaded_adapters(self):
                if adapter not in state.sides:
                    raise ValueError(
                        f"the adapter {adapter!r} was put into the supernet without being converted to its channels: "
                        "load it with load_lora_weights() or load_lora_adapter(), or call "
                        f"Supernet.of(model).adopt_adapter({adapter!r}) when its weights are those made for the "
                        "original model"
                    )
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in the stock class, with what the sizes need beside the weights.

        An older supernet in the folder is replaced as a whole: it is there until the new one is complete. Other files
        stay, weights of another variant if they belong to the same supernet.

        Where FSDP has split the weights over processes all of them have to call this, and the one with
        `is_main_process` writes: tensor by tensor, so that no process holds more than one whole.

        Raises:
            ValueError: If the target is a file, adapters are loaded, weights are offloaded or quantized, or the format
                is not safetensors.
        """
        if self.ofa_state is None:
            options = {"use_flashpack": True} if use_flashpack else {}
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size,
                push_to_hub, **options, **kwargs,
            )  # fmt: skip
            return
        if not safe_serialization or use_flashpack:
            raise ValueError(
                f"safe_serialization={safe_serialization}, use_flashpack={use_flashpack}: a supernet is saved as "
                "safetensors only"
            )
        self.check_can_be_saved(save_directory)
        from ofadiff.storage.split import is_split, save_split_model  # imports a part of torch that few need

        split = is_split(self)  # type: ignore[arg-type]
        how = variant, max_shard_size
        if not is_main_process:
            if split:
                save_split_model(self, None, *how)  # type: ignore[arg-type]
            return
        with written_aside(save_directory, self._stays) as folder:
            if split:
                save_split_model(self, folder, *how)  # type: ignore[arg-type]
            else:
                super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)  # type: ignore[misc]
            self.ofa_state.write_metadata(folder)
        if push_to_hub:
            upload(self, Path(save_directory).name, variant, kwargs)

    def enable_parallelism(self, *, config: Any, **kwargs: Any) -> None:
        """As in the stock class, for context parallelism.

        Raises:
            ValueError: If it is tensor parallelism.
        """
        check_not_tensor_parallel(config)
        super().enable_parallelism(config=config, **kwargs)  # type: ignore[misc]

    def check_can_be_saved(self, save_directory: str | Path) -> None:
        """Raises ValueError where saving would write something else than this supernet."""
        check_path("save_directory", save_directory)
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; a supernet is saved in a folder")
        if self.ofa_state is not None:
            self.ofa_state.check_not_fused()
        if is_adapted(self):
            raise ValueError("the model has adapters; unload_lora_weights() before saving the supernet")
        if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
            raise ValueError("the model's weights are offloaded; remove_all_hooks() before saving the supernet")
        check_not_quantized(self, "save the supernet before quantizing it")  # type: ignore[arg-type]

    def _stays(self, entry: Path) -> bool:
        """Whether an entry of a folder that this supernet replaces comes along."""
        assert self.ofa_state is not None
        if entry.name in (CONFIG_NAME, BASIS_NAME, ADAPTERS_NAME, "config.json"):
            return False
        if not entry.name.startswith(WEIGHTS):
            return True
        structure = structure_of(self.ofa_state.metadata(), self.ofa_state.basis)
        if not entry.name.endswith(".safetensors"):  # the index of a variant's shards
            return structure_of_folder(entry.parent) == structure
        marked = read_metadata(entry).get(STRUCTURE)
        if marked is None and structure_of_folder(entry.parent) == structure:
            add_to_safetensors(entry, {STRUCTURE: structure})
            marked = structure
        return marked == structure

    def __reduce__(self) -> tuple:
        # The class is made at run time: what unpickles or copies the model has to make it again.
        return _new_model, (self._stock_class,), self.__dict__


class AdaptableSupernet:
    """What a supernet adds to a stock class that peft's adapters can be put into."""

    ofa_state: SupernetState | None

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in the stock class, for a LoRA of the original model; it then follows the sizes.

        At size 1.0 it gives what it gives on the original; at every other size it acts as the fused original would, cut
        to that size.

        Raises:
            ValueError: If it is no plain LoRA (it is removed again then), or the weights are offloaded by hand.
        """
        state = self.ofa_state
        given: Any = (pretrained_model_name_or_path_or_dict, prefix)
        if state is None:
            super().load_lora_adapter(*given, hotswap=hotswap, **kwargs)  # type: ignore[misc]
            return
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            check_is_lora(pretrained_model_name_or_path_or_dict, prefix)
        with state.lock, without_offloading(self, kwargs.pop("_pipeline", None)):
            if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
                raise ValueError("the model's weights are offloaded; load the adapter before offloading")
            before = set(loaded_adapters(self))
            super().load_lora_adapter(*given, hotswap=hotswap, **kwargs)  # type: ignore[misc]
            swapped = {kwargs["adapter_name"]} if hotswap else set()
            for name in (set(loaded_adapters(self)) - before) | swapped:
                try:
                    state.adopt_adapter(self, name, name in swapped)  # type: ignore[arg-type]
                except ValueError:
                    self.delete_adapters(name)  # type: ignore[attr-defined]
                    raise

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in the stock class."""
        super().delete_adapters(adapter_names)  # type: ignore[misc]
        self._forget_deleted()

    def unload_lora(self) -> None:
        """As in the stock class."""
        super().unload_lora()  # type: ignore[misc]
        self._forget_deleted()

    def _forget_deleted(self) -> None:
        if self.ofa_state is not None:
            present = loaded_adapters(self)
            self.ofa_state.sides = {name: sides for name, sides in self.ofa_state.sides.items() if name in present}


def supernet_class(cls: type[ModelMixin]) -> type[ModelMixin]:
    """The class of the supernets of a diffusers denoiser class; it carries the same name."""
    return _supernet_class(stock_class(cls))


@functools.cache
def _supernet_class(stock: type[ModelMixin]) -> type[ModelMixin]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SupernetModel.forward(self, *args, **kwargs)

    # Not functools.wraps: who unwraps a forward, as accelerate does, would end up past this one.
    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    forward.__doc__ = stock.forward.__doc__
    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "forward": forward,
        "_stock_class": stock,
        **refusals(stock, SUPERNET_REFUSES, unless=_is_stock),
    }
    adapters = (AdaptableSupernet,) if issubclass(stock, PeftAdapterMixin) else ()
    return SupernetType(stock.__name__, (SupernetModel, *adapters, stock), namespace)


def _is_stock(model: Any) -> bool:
    """Whether it was made by its class alone, `type(supernet.model)(…)`, and not by a `Supernet`."""
    return model.ofa_state is None


def _new_model(stock: type[ModelMixin]) -> ModelMixin:
    return object.__new__(supernet_class(stock))


# Methods of diffusers models that cannot be right on a supernet, and why.
SUPERNET_REFUSES = {
    "fuse_qkv_projections": "fused projections cannot follow the sizes of a supernet; fuse those of extract(size)",
    "_load_ip_adapter_weights": (
        "an IP-Adapter works with the original model only, not with the sizes of an OFA checkpoint"
    ),
    "load_attn_procs": (
        "attention processors with weights of the original do not fit a supernet; load LoRAs with load_lora_weights() "
        "or load_lora_adapter()"
    ),
    "save_lora_adapter": (
        "a LoRA in a supernet has been converted to its channels and would not fit the original model any more; keep "
        "the file that it was loaded from"
    ),
}


def unwrapped(module: Any) -> Any:
    """The diffusers model inside `torch.compile`'s, DDP's, peft's or another wrapper; anything else as it is."""
    models = module.modules() if isinstance(module, nn.Module) else ()
    return next((model for model in models if isinstance(model, ModelMixin)), module)

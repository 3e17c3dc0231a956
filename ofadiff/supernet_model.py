"""What a denoiser that is a supernet knows of itself, whichever pipeline, wrapper or thread it is reached by."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from ofadiff.adapters.size_adapter import SizeAdapter, save_size_adapters
from ofadiff.basis.change import BASIS_NAME, save_basis
from ofadiff.channels import ChannelGroup, Slice
from ofadiff.cutting import kept_by_module
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.stand_ins.equality import SupernetType, stock_class
from ofadiff.stand_ins.refusals import refusals
from ofadiff.storage.files import add_to_safetensors, read_metadata, written_aside
from ofadiff.storage.hub import upload
from ofadiff.storage.ofa_config import ADAPTERS_NAME, FORMAT_VERSION
from ofadiff.storage.structure import STRUCTURE, WEIGHTS, fingerprint, structure_of, structure_of_folder


class SizeLock:
    """Belongs to the thread that uses the model; others wait. A copy of it is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return SizeLock, ()


class SupernetState:
    """The sizes of one elastic model, and what it takes to switch between them.

    The model refers to it, and not the other way round: a model that nobody holds is freed at once.

    Attributes:
        groups: The model's channel groups.
        subnets: The sizes.
        basis: See `ofadiff.basis.change`.
        provenance: JSON values that say how it was made.
        size_adapters: LoRAs of single sizes.
        sides: For every adapter of the original that follows the sizes its layers, see `adopt_adapter`.
        size: Size that the model is set to.
        lock: Held while a size is set for some calls, and during every forward.
    """

    def __init__(
        self,
        model: ModelMixin,
        groups: Sequence[ChannelGroup],
        subnets: SizeTable,
        basis: dict[str, torch.Tensor],
        provenance: dict[str, Any],
    ) -> None:
        self.groups = list(groups)
        self.subnets = subnets
        self.basis = basis
        self.provenance = provenance
        self.size_adapters: dict[float, SizeAdapter] = {}
        self.sides: dict[str, list[tuple[nn.Module, str, Slice]]] = {}
        self.lock = SizeLock()
        self._blocks = [(model.get_submodule(group.block), group) for group in groups if group.resize is not None]
        self.look_up_layers(model)
        self.set_size("largest")

    def look_up_layers(self, model: ModelMixin) -> None:
        """Everything that a switch sets, so that a switch only assigns."""
        adapted = {name for adapter in self.size_adapters.values() for name in adapter.updates}
        self._layers = {}
        for subnet in self.subnets:
            kept = kept_by_module(self.groups, subnet.widths)
            adapter = self.size_adapters.get(subnet.size)
            updates = {} if adapter is None else adapter.updates
            self._layers[subnet.size] = [
                (model.get_submodule(name), kept.get(name, ()), (updates[name],) if name in updates else ())
                for name in {**kept, **dict.fromkeys(sorted(adapted))}
            ]

    def set_size(self, size: float | str) -> None:
        """Sets the model to a size. Waits for a thread that uses the model.

        Raises:
            ValueError: If there is no such size; the model then stays as it was.
        """
        subnet = self.subnets.find(size)
        with self.lock:
            for layer, kept, updates in self._layers[subnet.size]:
                # Past nn.Module's own __setattr__, which looks for parameters and takes most of a switch's time.
                vars(layer).update(kept=kept, updates=updates)
            for sides in self.sides.values():
                for side, name, part in sides:
                    units = subnet.widths[name]
                    side.kept = ((part, units),) if units < part.units else ()
            for block, group in self._blocks:
                group.resize(block, group, subnet.widths[group.name])  # type: ignore[misc]
            self.size = subnet.size

    @contextmanager
    def at(self, size: float | str) -> Iterator[None]:
        """A block in which the model is this thread's and has a size; the size from before returns.

        Raises:
            ValueError: If there is no such size.
        """
        self.subnets.find(size)
        with self.lock:
            before = self.size
            self.set_size(size)
            try:
                yield
            finally:
                self.set_size(before)

    def check_not_fused(self) -> None:
        """Raises ValueError if projections of an attention were fused: what they make does not follow the sizes."""
        for block, group in self._blocks:
            if vars(block).get("fused_projections"):
                raise ValueError(
                    f"the projections of {group.name} are fused and cannot follow the sizes of a supernet; fuse those "
                    "of extract(size)"
                )

    def adopt_adapter(self, model: ModelMixin, adapter: str, swapped: bool = False) -> None:
        """See `Supernet.adopt_adapter`; `swapped` says that the adapter has new weights in place of converted ones."""
        from ofadiff.adapters.original import adopt_adapter  # peft is needed for adapters only

        if adapter in self.sides and not swapped:
            raise ValueError(f"the adapter {adapter!r} follows the sizes already; converting it twice would be wrong")
        with self.lock:
            sides = adopt_adapter(model, self.groups, adapter, self.basis)
            # Adapters that were deleted since must not be kept alive.
            present = loaded_adapters(model)
            self.sides = {name: old for name, old in self.sides.items() if name in present}
            self.sides[adapter] = sides
            self.set_size(self.size)

    def metadata(self) -> dict[str, Any]:
        """What `ofa_config.json` says."""
        return {
            "format_version": FORMAT_VERSION,
            "groups": [fingerprint(group) for group in self.groups],
            **self.subnets.to_dict(),
            "provenance": self.provenance,
        }

    def write_metadata(self, folder: Path) -> None:
        """Writes `ofa_config.json`, the basis and the adapters of sizes beside the weights, and marks these as theirs.

        Raises:
            ValueError: If weights of another supernet lie there.
        """
        values = self.metadata()
        structure = structure_of(values, self.basis)
        for file in folder.glob(f"{WEIGHTS}*.safetensors"):
            marked = read_metadata(file).get(STRUCTURE)
            if marked is None:
                add_to_safetensors(file, {STRUCTURE: structure})
            elif marked != structure:
                raise ValueError(f"{file} belongs to another supernet; save this one in another folder")
        save_basis(self.basis, folder, {STRUCTURE: structure})
        save_size_adapters(self.size_adapters, folder)
        text = json.dumps({**values, STRUCTURE: structure}, indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


class SupernetModel:
    """What a supernet adds to its stock class.

    The denoiser's class is one of these, under the name of the stock class: to diffusers it is that class. So whatever
    is done to the denoiser knows of its sizes: a pipeline of any class saves them, a LoRA of the original is converted,
    a forward in another thread waits until the size is its own again.
    """

    ofa_state: SupernetState | None = None
    _stock_class: type[ModelMixin]

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

        Raises:
            ValueError: If the target is a file, adapters are loaded, weights are offloaded, or the format is not
                safetensors.
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
        if not is_main_process:
            return
        with written_aside(save_directory, self._stays) as folder:
            super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)  # type: ignore[misc]
            self.ofa_state.write_metadata(folder)
        if push_to_hub:
            upload(self, Path(save_directory).name, variant, kwargs)

    def check_can_be_saved(self, save_directory: str | Path) -> None:
        """Raises ValueError where saving would write something else than this supernet."""
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; a supernet is saved in a folder")
        if self.ofa_state is not None:
            self.ofa_state.check_not_fused()
        if is_adapted(self):
            raise ValueError("the model has adapters; unload_lora_weights() before saving the supernet")
        if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
            raise ValueError("the model's weights are offloaded; remove_all_hooks() before saving the supernet")

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
        with state.lock, _without_offloading(self, kwargs.pop("_pipeline", None)):
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


def loaded_adapters(model: Any) -> tuple[str, ...]:
    """Names of the adapters that peft has put into a model."""
    return tuple(vars(model).get("peft_config") or ())  # peft gives a model this with its first adapter


def is_adapted(model: Any) -> bool:
    """Whether a model has weights of adapters."""
    return any("lora_" in name for name in model.state_dict())


def check_is_lora(state_dict: Mapping[str, torch.Tensor], prefix: str | None) -> None:
    """Raises ValueError if an adapter has weights for the denoiser that are no LoRA's, naming one."""
    for key in state_dict:
        if (prefix is None or key.startswith(f"{prefix}.")) and not ("lora" in key or key.endswith(("alpha", "scale"))):
            raise ValueError(f"the adapter has {key!r}; only plain LoRA can follow the sizes")


@contextmanager
def _without_offloading(model: Any, pipeline: Any) -> Iterator[None]:
    """A block in which a pipeline's weights are not offloaded: a hook would go on calling a layer as it was."""
    model_offload, sequential_offload, *group_offload = model._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif any(group_offload):
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            _maybe_remove_and_reapply_group_offloading(model)

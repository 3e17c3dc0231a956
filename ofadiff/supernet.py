"""The supernet: a denoiser whose groups are sorted by importance and can be set to any of its sizes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from ofadiff import extracted
from ofadiff.allocation import check_scores
from ofadiff.basis import PERMUTATION, load_basis, save_basis
from ofadiff.channels import ChannelGroup, Slice, active_part, check_widths
from ofadiff.elastic import check_can_be_elastic, kept_by_module, make_model_elastic, permute_units
from ofadiff.layers import ELASTIC, is_adaptable, make_elastic
from ofadiff.rotation import check_not_rotated
from ofadiff.size_adapter import SizeAdapter, load_size_adapters, save_size_adapters
from ofadiff.sizes import CONFIG_NAME, SizeTable, Subnet
from ofadiff.unet_elastic import find_channel_groups

FORMAT_VERSION = 1


class Supernet:
    """Sorts a denoiser's groups by importance and makes it elastic, in place; starts at its largest size.

    The model keeps its class, its parameters and its state-dict keys; only its layers now compute with the active part
    of their weights. At full size it computes what it computed before. A size must not change between a forward and
    its backward: gradient checkpointing recomputes the forward there.

    Args:
        model: A diffusers denoiser at full size.
        groups: Its channel groups, from `find_channel_groups`; those that were rotated are not sorted again.
        scores: For every group its scores, `(width,)`, larger is more important.
        subnets: Nested widths, from `allocate`.
        provenance: What to remember of how it was made (JSON values), such as the criterion and the teacher.

    Raises:
        ValueError: If scores or widths do not fit the groups, subnets do not nest, or the model is elastic, extracted,
            adapted, offloaded, or was rotated with other groups.
        TypeError: If `provenance` holds more than JSON values.

    Example:
        >>> supernet = Supernet(unet, groups, scores, subnets)
        >>> supernet.set_size(0.5)
        >>> small = supernet.extract(0.5)
    """

    def __init__(
        self,
        model: ModelMixin,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, torch.Tensor],
        subnets: SizeTable,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(model, extracted.ExtractedModel):
            raise ValueError(f"the model is an extracted {type(model).__name__}; compress the original model instead")
        check_scores(groups, scores)
        for subnet in subnets:
            check_widths(groups, subnet.widths)
        for smaller, larger in itertools.pairwise(subnets):
            if any(width > larger.widths[name] for name, width in smaller.widths.items()):
                raise ValueError(f"the subnets of sizes {smaller.size:g} and {larger.size:g} do not nest")
        for group in groups:
            check_not_rotated(model, group)
        provenance = json.loads(json.dumps(provenance or {}))  # what cannot be saved is an error now
        basis = {}
        make_model_elastic(model, groups)
        for group in groups:
            if group.basis is None:
                order = torch.argsort(scores[group.name], descending=True, stable=True).cpu()
                permute_units(model, group, order)
                basis[f"{group.name}.{PERMUTATION}"] = order
            else:
                for name, matrices in group.basis.items():
                    basis[f"{group.name}.{name}"] = matrices.cpu()
        self._build(model, groups, subnets, basis, provenance)

    def _build(
        self,
        model: ModelMixin,
        groups: Sequence[ChannelGroup],
        subnets: SizeTable,
        basis: dict[str, torch.Tensor],
        provenance: dict[str, Any],
    ) -> None:
        self.model = model
        self.groups = list(groups)
        self.subnets = subnets
        self.basis = basis
        self.provenance = provenance
        self._size_adapters: dict[float, SizeAdapter] = {}
        self._look_up_layers()
        self._blocks = [(model.get_submodule(group.block), group) for group in groups if group.resize is not None]
        self._adapters: dict[str, list[tuple[nn.Module, str, Slice]]] = {}
        self.set_size("largest")

    def _look_up_layers(self) -> None:
        """Everything that a switch sets, so that a switch only assigns."""
        adapted = {name for adapter in self._size_adapters.values() for name in adapter.updates}
        self._layers = {}
        for subnet in self.subnets:
            kept = kept_by_module(self.groups, subnet.widths)
            adapter = self._size_adapters.get(subnet.size)
            updates = {} if adapter is None else adapter.updates
            self._layers[subnet.size] = [
                (self.model.get_submodule(name), kept.get(name, ()), (updates[name],) if name in updates else ())
                for name in {**kept, **dict.fromkeys(sorted(adapted))}
            ]

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes, ascending."""
        return self.subnets.sizes

    @property
    def size(self) -> float:
        """The size that the model is set to."""
        return self._size

    @property
    def _adapted(self) -> bool:
        return any("lora_" in name for name in self.model.state_dict())

    @property
    def size_adapters(self) -> Mapping[float, SizeAdapter]:
        """The adapters by their sizes; sizes without one are not in it."""
        return MappingProxyType(self._size_adapters)

    def set_size(self, size: float | str) -> None:
        """Sets the model to a size: one of `sizes`, `"smallest"` or `"largest"`; its adapter, if any, comes with it.

        Raises:
            ValueError: If there is no such size; lists those there are. The model then stays as it was.
        """
        subnet = self.subnets.find(size)
        for layer, kept, updates in self._layers[subnet.size]:
            # Past nn.Module's own __setattr__, which looks for parameters and takes most of a switch's time.
            vars(layer).update(kept=kept, updates=updates)
        for sides in self._adapters.values():
            for side, name, part in sides:
                units = subnet.widths[name]
                side.kept = ((part, units),) if units < part.units else ()
        for block, group in self._blocks:
            group.resize(block, group, subnet.widths[group.name])  # type: ignore[misc]
        self._size = subnet.size

    def set_size_adapter(self, size: float | str, adapter: SizeAdapter | None) -> None:
        """Gives a size the LoRA that was trained on it, in place of the one it had; None takes that one away.

        The adapter is a part of its size: it acts when the size is set and never else, `extract` merges it, and
        `save_pretrained` writes it beside the weights, which stay what they are. LoRAs that a user loads are another
        matter: `set_adapters`, `fuse_lora`, `unload_lora_weights` and the like act on those alone.

        Args:
            size: One of `sizes`, `"smallest"` or `"largest"`.
            adapter: Trained on `extract(size)`. It is moved to the model's device and dtype.

        Raises:
            ValueError: If there is no such size, the adapter does not fit it, or the model has LoRAs or is offloaded.
            TypeError: If the adapter changes a layer that is neither linear nor an ungrouped convolution.
        """
        subnet = self.subnets.find(size)
        if self._adapted:
            raise ValueError("the model has LoRAs; unload_lora_weights(), set the size's adapter, then load them again")
        if adapter is not None:
            self._check_size_adapter(subnet, adapter)
        place = f"size_adapter_{self.sizes.index(subnet.size)}"
        old = self._size_adapters.pop(subnet.size, None)
        for name in [] if old is None else old.updates:
            layer = self.model.get_submodule(name)
            delattr(layer, place)
            layer.updates = ()
        if adapter is not None:
            self._size_adapters[subnet.size] = adapter
            for name, update in adapter.updates.items():
                layer = self.model.get_submodule(name)
                if not isinstance(layer, tuple(ELASTIC.values())):
                    make_elastic(layer, name)
                layer.add_module(place, update.to(layer.weight.device, layer.weight.dtype))
        self._look_up_layers()
        self.set_size(self.size)

    def _check_size_adapter(self, subnet: Subnet, adapter: SizeAdapter) -> None:
        modules, kept = dict(self.model.named_modules()), kept_by_module(self.groups, subnet.widths)
        for name, update in adapter.updates.items():
            if name not in modules:
                raise ValueError(f"the adapter changes {name}, which the model does not have")
            layer = modules[name]
            if not is_adaptable(layer):
                raise TypeError(f"the adapter changes {name}, a {type(layer).__name__} that no size can adapt")
            if not isinstance(layer, tuple(ELASTIC.values())):
                check_can_be_elastic(layer, name)
            if layer.weight.is_meta:
                raise ValueError("the model's weights are offloaded; set the size's adapter before offloading")
            shape = tuple(active_part(layer.weight, "weight", kept.get(name, ())).shape)
            if update.shape != shape:
                raise ValueError(
                    f"the adapter's {name} is for a weight of shape {update.shape}; at size {subnet.size:g} it has "
                    f"{shape}: was it trained on extract({subnet.size:g})?"
                )

    def adopt_adapter(self, adapter: str) -> None:
        """Makes a LoRA of the original model that peft has injected into the model follow its sizes.

        Its weights are taken, in place, into the order and the basis that the supernet's channels are in; at every size
        it acts as the original with the LoRA fused would, cut to that size.

        Args:
            adapter: Name of the adapter. Adopting a name again (after a hot swap) replaces it.

        Raises:
            ValueError: If it is no plain LoRA.
        """
        from ofadiff.adapters import adopt_adapter  # peft is needed for adapters only

        sides = adopt_adapter(self.model, self.groups, adapter, self.basis)
        # Adapters that were deleted since must not be kept alive.
        present = getattr(self.model, "peft_config", {})
        self._adapters = {name: old for name, old in self._adapters.items() if name in present}
        self._adapters[adapter] = sides
        self.set_size(self.size)

    @contextmanager
    def at(self, size: float | str) -> Iterator[ModelMixin]:
        """The model at a size for the length of a `with` block; the size from before returns, also on an error.

        Raises:
            ValueError: If there is no such size.
        """
        before = self.size
        self.set_size(size)
        try:
            yield self.model
        finally:
            self.set_size(before)

    def extract(self, size: float | str) -> ModelMixin:
        """A subnet as a stand-alone model of class `OFA<DiffusersClass>`; equal to the supernet at that size.

        Args:
            size: One of `sizes`, `"smallest"` or `"largest"`.

        Returns:
            A copy in eval mode, on the model's device, in its dtype and memory format (channels_last or not).

        Raises:
            ValueError: If there is no such size, or LoRAs are loaded; the size's own adapter is merged.
        """
        subnet = self.subnets.find(size)
        if self._adapted:
            raise ValueError("the model has adapters; fuse_lora() if they shall stay, and unload_lora_weights() first")
        small = extracted.extract(self.model, self.groups, subnet.widths, self.basis)
        if subnet.size in self._size_adapters:
            self._size_adapters[subnet.size].merge_into(small)
        return small

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves a plain diffusers model at full size with `ofa_config.json` and `ofa_basis.safetensors` beside it.

        Adapters of sizes are written beside it too; plain diffusers does not see them.

        Args:
            save_directory: Folder of the denoiser, such as `unet/` of a pipeline; made if it is not there.
            **kwargs: As in the denoiser's own `save_pretrained`, such as `variant` or `max_shard_size`.

        Raises:
            ValueError: If the target is a file, adapters are loaded, weights are offloaded, or `safe_serialization` is
                off.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: a supernet is saved as safetensors only")
        if kwargs.get("is_main_process", True):
            self.save_metadata(save_directory)
        self.model.save_pretrained(save_directory, **kwargs)

    def save_metadata(self, directory: str | Path) -> None:
        """Writes `ofa_config.json`, `ofa_basis.safetensors` and the sizes' adapters into the denoiser's folder.

        Raises:
            ValueError: If the target is a file, adapters are loaded (the weights would be saved under other names), or
                the weights are offloaded.
        """
        directory = Path(directory)
        if directory.is_file():
            raise ValueError(f"{directory} is a file; a supernet is saved in a folder")
        if self._adapted:
            raise ValueError("the model has adapters; unload_lora_weights() before saving the supernet")
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError("the model's weights are offloaded; remove_all_hooks() before saving the supernet")
        directory.mkdir(parents=True, exist_ok=True)
        save_basis(self.basis, directory)
        save_size_adapters(self._size_adapters, directory)
        values = {
            "format_version": FORMAT_VERSION,
            "groups": [_fingerprint(group) for group in self.groups],
            **self.subnets.to_dict(),
            "provenance": self.provenance,
        }
        (directory / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> Supernet:
        """Loads what `save_pretrained` wrote.

        Args:
            directory: Folder of the denoiser: `config.json`, weights, `ofa_config.json`, `ofa_basis.safetensors`, and
                `ofa_adapters/` if sizes have adapters.
            **kwargs: As in the denoiser's own `from_pretrained`, such as `torch_dtype` or `variant`.

        Raises:
            ValueError: If the folder is no OFA checkpoint, was made for other channel groups, or an argument cannot
                work.
        """
        for name in ("device_map", "quantization_config", "output_loading_info", "subfolder"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported for a supernet; load one size with OFAPipeline instead")
        directory = Path(directory)
        values = read_ofa_config(directory)
        stock = denoiser_class(directory)
        model = stock.from_pretrained(directory, **kwargs)
        saved = {group["name"] for group in values["groups"]}
        groups = [group for group in find_channel_groups(model) if group.name in saved]
        _check_fingerprints(groups, values["groups"], directory)
        make_model_elastic(model, groups)
        supernet = cls.__new__(cls)
        supernet._build(model, groups, SizeTable.from_dict(values), load_basis(directory), values["provenance"])
        for size, adapter in load_size_adapters(directory, supernet.sizes).items():
            supernet.set_size_adapter(size, adapter)
        return supernet


def read_ofa_config(directory: str | Path) -> dict[str, Any]:
    """What `ofa_config.json` in a denoiser's folder says.

    Raises:
        ValueError: If there is none, or it was written in another format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {CONFIG_NAME}, so it is no OFA checkpoint; "
            "recipes/compress_ddpm.py, compress_dit.py or compress_sd.py makes one"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {values.get('format_version')!r}; this ofadiff reads {FORMAT_VERSION}"
        )
    return values


def denoiser_class(directory: str | Path) -> type[ModelMixin]:
    """The diffusers class that a denoiser's `config.json` names.

    Raises:
        ValueError: If there is no `config.json` or it names no diffusers model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no config.json, so it is no diffusers model")
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    stock = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(stock, type) and issubclass(stock, ModelMixin)):
        raise ValueError(f"{path} names the class {name!r}, which is no diffusers model")
    return stock


def _fingerprint(group: ChannelGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "stage": group.stage,
        "width": group.width,
        "channels_per_unit": group.channels_per_unit,
    }


def _check_fingerprints(groups: Sequence[ChannelGroup], saved: list[dict[str, Any]], directory: Path) -> None:
    found = [_fingerprint(group) for group in groups]
    if found != saved:
        differing = [entry for entry in found if entry not in saved] + [entry for entry in saved if entry not in found]
        raise ValueError(
            f"{directory / CONFIG_NAME} was made for other channel groups than this model has; first difference: "
            f"{differing[0] if differing else 'their order'}"
        )

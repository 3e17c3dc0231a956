"""The supernet: a denoiser whose groups are sorted by importance and can be set to any of its sizes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ModelMixin

from ofadiff.adapters.loaded import is_adapted
from ofadiff.adapters.size_adapter import SizeAdapter, load_size_adapters
from ofadiff.basis.change import PERMUTATION, compact, load_basis
from ofadiff.basis.rotation import check_not_rotated
from ofadiff.channels import ChannelGroup, check_groups, check_scores, check_widths
from ofadiff.cutting import check_can_be_elastic, kept_by_module, make_model_elastic, permute_units
from ofadiff.diffusers_hooks import empty_caches
from ofadiff.extraction.extracted_model import ExtractedModel
from ofadiff.extraction.subnet import extract
from ofadiff.layers import ELASTIC, is_adaptable, make_elastic
from ofadiff.quantized import active_parameter, check_not_quantized
from ofadiff.reading.arguments import check_argument, check_path
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.size_schedule import SizeSchedule, check_schedule
from ofadiff.sizes import SizeTable, Subnet
from ofadiff.storage.ofa_config import load_model, read_ofa_config, read_schedules
from ofadiff.storage.structure import check_basis, check_fingerprints, check_structure
from ofadiff.supernet_model import SupernetModel, supernet_class, unwrapped
from ofadiff.supernet_state import SupernetState
from ofadiff.unet_elastic import find_channel_groups


class Supernet:
    """Sorts a denoiser's groups by importance and makes it elastic, in place; starts at its largest size.

    The model keeps its parameters and its state-dict keys; its layers now compute with the active part of their
    weights, and its class, still under the same name, knows of the sizes: saved, adapted or called through any
    pipeline, the model stays a supernet. At full size it computes what it computed before. A size must not change
    between a forward and its backward: gradient checkpointing recomputes the forward there.

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
        >>> small.num_parameters() == subnets[0.5].params
        True
    """

    def __init__(
        self,
        model: ModelMixin,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, torch.Tensor],
        subnets: SizeTable,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(model, ExtractedModel):
            raise ValueError(f"the model is an extracted {type(model).__name__}; compress the original model instead")
        check_groups(model, groups)
        check_scores(groups, scores)
        table = isinstance(subnets, SizeTable) and len(subnets) > 0
        check_argument("subnets", subnets, table, "the SizeTable that allocate gives, of one size or more")
        check_argument("provenance", provenance, provenance is None or isinstance(provenance, dict), "a dict, or None")
        for subnet in subnets:
            check_widths(groups, subnet.widths)
        for smaller, larger in itertools.pairwise(subnets):
            if any(width > larger.widths[name] for name, width in smaller.widths.items()):
                raise ValueError(f"the subnets of sizes {smaller.size:g} and {larger.size:g} do not nest")
        for group in groups:
            check_not_rotated(model, group)
        with in_one_sentence("the provenance cannot be kept as JSON"):
            provenance = json.loads(json.dumps(provenance or {}))
        basis = {}
        make_model_elastic(model, groups)
        for group in groups:
            if group.basis is None:
                order = torch.argsort(scores[group.name], descending=True, stable=True).cpu()
                permute_units(model, group, order)
                basis[f"{group.name}.{PERMUTATION}"] = compact(order)
            else:
                for name, matrices in group.basis.items():
                    basis[f"{group.name}.{name}"] = compact(matrices.cpu())
        self._build(model, groups, subnets, basis, provenance)

    def _build(
        self,
        model: ModelMixin,
        groups: Sequence[ChannelGroup],
        subnets: SizeTable,
        basis: dict[str, torch.Tensor],
        provenance: dict[str, Any],
    ) -> None:
        self.model: Any = model
        self._state = SupernetState(model, groups, subnets, basis, provenance)
        model.__class__ = supernet_class(type(model))
        model.ofa_state = self._state

    @classmethod
    def of(cls, model: Any) -> Supernet:
        """The supernet that a model is, whatever it was reached by; compiled and wrapped models are too.

        Raises:
            ValueError: If the model is none.
        """
        model = unwrapped(model)
        if not isinstance(model, SupernetModel) or model.ofa_state is None:
            raise ValueError(f"this {type(model).__name__} is no supernet")
        supernet = cls.__new__(cls)
        supernet.model, supernet._state = model, model.ofa_state
        return supernet

    @property
    def groups(self) -> list[ChannelGroup]:
        """The model's channel groups."""
        return self._state.groups

    @property
    def subnets(self) -> SizeTable:
        """The sizes with their widths and costs."""
        return self._state.subnets

    @property
    def basis(self) -> dict[str, torch.Tensor]:
        """What leads from the original model's channels to this one's, see `ofadiff.basis.change`."""
        return self._state.basis

    @property
    def provenance(self) -> dict[str, Any]:
        """How the supernet was made."""
        return self._state.provenance

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes, ascending."""
        return self.subnets.sizes

    @property
    def size(self) -> float:
        """The size that the model is set to."""
        return self._state.size

    @property
    def size_adapters(self) -> Mapping[float, SizeAdapter]:
        """The adapters by their sizes; sizes without one are not in it."""
        return MappingProxyType(self._state.size_adapters)

    def set_size(self, size: float | str) -> None:
        """Sets the model to a size: one of `sizes`, `"smallest"` or `"largest"`; its adapter, if any, comes with it.

        A thread that uses the model, in a pipeline's call or in an `at` block, is waited for. What diffusers' caches
        (`enable_cache`) hold of another size is forgotten.

        Raises:
            ValueError: If there is no such size; lists those there are. The model then stays as it was.
        """
        with self._state.lock:
            before = self.size
            self._state.set_size(size)
            if self.size != before:
                empty_caches([self.model, *self._state.modules])

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
        if is_adapted(self.model):
            raise ValueError("the model has LoRAs; unload_lora_weights(), set the size's adapter, then load them again")
        if adapter is not None:
            self._check_size_adapter(subnet, adapter)
        place = f"size_adapter_{self.sizes.index(subnet.size)}"
        with self._state.lock:
            old = self._state.size_adapters.pop(subnet.size, None)
            for name in [] if old is None else old.updates:
                layer = self.model.get_submodule(name)
                delattr(layer, place)
                layer.updates = ()
            if adapter is not None:
                self._state.size_adapters[subnet.size] = adapter
                for name, update in adapter.updates.items():
                    layer = self.model.get_submodule(name)
                    if not isinstance(layer, tuple(ELASTIC.values())):
                        make_elastic(layer, name)
                    layer.add_module(place, update.to(layer.weight.device, layer.weight.dtype))
            self._state.look_up_layers(self.model)
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
            shape = tuple(active_parameter(layer.weight, "weight", kept.get(name, ())).shape)
            if update.shape != shape:
                raise ValueError(
                    f"the adapter's {name} is for a weight of shape {update.shape}; at size {subnet.size:g} it has "
                    f"{shape}: was it trained on extract({subnet.size:g})?"
                )

    @property
    def schedules(self) -> Mapping[str, SizeSchedule]:
        """The schedules of sizes by their names."""
        return MappingProxyType(self._state.schedules)

    def set_schedule(self, name: str, schedule: SizeSchedule | None) -> None:
        """Keeps a schedule under a name, which a pipeline then takes as its `size=`, and saves it with the sizes.

        Args:
            name: Any but `"smallest"` and `"largest"`; one that is there is replaced.
            schedule: Of these sizes; None takes it away.

        Raises:
            ValueError: If the name or a size cannot be.
        """
        check_schedule(self.subnets, name, schedule)
        if schedule is None:
            self._state.schedules.pop(name, None)
        else:
            self._state.schedules[name] = schedule

    def adopt_adapter(self, adapter: str) -> None:
        """Makes a LoRA of the original model that peft has injected into the model follow its sizes.

        `load_lora_weights` of pipelines and `load_lora_adapter` of the model do so themselves; this is for adapters
        that came into the model in another way, such as `add_adapter` with `set_peft_model_state_dict` after it. Until
        then the model refuses to be called. The adapter's weights are taken, in place, into the order and the basis
        that the supernet's channels are in; at every size it acts as the original with the LoRA fused would, cut to
        that size.

        Args:
            adapter: Name of the adapter.

        Raises:
            ValueError: If it is no plain LoRA, or follows the sizes already.
        """
        self._state.adopt_adapter(self.model, adapter)

    @contextmanager
    def at(self, size: float | str) -> Iterator[ModelMixin]:
        """The model at a size for the length of a `with` block; the size from before returns, also on an error.

        Until the block ends the model is this thread's: others that set a size or call the model wait. So a thread that
        the block waits for must not use the model. Inside of a pipeline's call, as in a callback, the size is this
        one, whatever schedule or guidance that call has.

        Raises:
            ValueError: If there is no such size.
        """
        self.subnets.find(size)
        with self.used_at(None):
            before = self.size
            self.set_size(size)
            try:
                yield self.model
            finally:
                self.set_size(before)

    @contextmanager
    def used_at(self, size: float | str | None) -> Iterator[None]:
        """Like `at`; with None the model is this thread's at the size that is set, which the block may change."""
        if size is not None:
            with self.at(size):
                yield
            return
        state = self._state
        with state.lock:
            before = state.user, state.answer
            state.user, state.answer = object(), None
            try:
                yield
            finally:
                state.user, state.answer = before

    @property
    def user(self) -> object:
        """Stands for the innermost block of `at` or `used_at` that has the model; None outside of all."""
        return self._state.user

    @contextmanager
    def answering(self, answer: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]) -> Iterator[None]:
        """A block in which every call of the model is answered by a function, which may set sizes.

        Until the block ends the model is this thread's.

        Args:
            answer: Gets the model's own call, and the arguments by position and by name.

        Raises:
            ValueError: If the block is in another one.
        """
        with self._state.lock:
            if self._state.answer is not None:
                raise ValueError("the model's calls are answered by a function already; leave that block first")
            self._state.answer = answer
            try:
                yield
            finally:
                self._state.answer = None

    def extract(self, size: float | str) -> ModelMixin:
        """A subnet as a stand-alone model of class `OFA<DiffusersClass>`; equal to the supernet at that size.

        Args:
            size: One of `sizes`, `"smallest"` or `"largest"`.

        Returns:
            A copy in eval mode, on the model's device, in its dtype and memory format (channels_last or not).

        Raises:
            ValueError: If there is no such size, LoRAs are loaded, projections fused or weights quantized; the size's
                own adapter is merged.
        """
        subnet = self.subnets.find(size)
        self._state.check_not_fused()
        check_not_quantized(self.model, "extract a size before quantizing, or load it with size=, and quantize that")
        if is_adapted(self.model):
            raise ValueError("the model has adapters; fuse_lora() if they shall stay, and unload_lora_weights() first")
        small = extract(self.model, self.groups, subnet.widths, self.basis)
        if subnet.size in self.size_adapters:
            self._state.size_adapters[subnet.size].merge_into(small)
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
        self.model.save_pretrained(save_directory, **kwargs)

    def save_metadata(self, directory: str | Path) -> None:
        """Writes what `save_pretrained` writes beside the weights, for weights that lie there already.

        Raises:
            ValueError: If the target is a file, the weights there are another supernet's, adapters are loaded (the
                weights would be saved under other names), or the weights are offloaded.
        """
        self.model.check_can_be_saved(directory)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._state.write_metadata(Path(directory))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, model: ModelMixin | type[ModelMixin] | None = None, **kwargs: Any
    ) -> Supernet:
        """Loads what `save_pretrained` wrote.

        Args:
            directory: Folder of the denoiser: `config.json`, weights, `ofa_config.json`, `ofa_basis.safetensors`, and
                `ofa_adapters/` if sizes have adapters.
            model: Class of the denoiser, or one that was built of it and gets the weights, where it is neither
                diffusers' nor in `ofadiff.storage.model_classes.MODEL_CLASSES`.
            **kwargs: As in the denoiser's own `from_pretrained`, such as `torch_dtype` or `variant`.

        Raises:
            ValueError: If the folder is no OFA checkpoint, was made for other channel groups, `model` is of another
                class, or an argument cannot work.
        """
        for name in ("device_map", "quantization_config", "output_loading_info", "subfolder"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported for a supernet; load one size with OFAPipeline instead")
        check_path("directory", directory)
        directory = Path(directory)
        values = read_ofa_config(directory)
        model = load_model(directory, model, kwargs)
        saved = {group["name"] for group in values["groups"]}
        groups = [group for group in find_channel_groups(model) if group.name in saved]
        check_fingerprints(groups, values["groups"], directory)
        check_structure(directory, values, kwargs.get("variant"))
        basis = load_basis(directory)
        check_basis(groups, basis, directory)
        make_model_elastic(model, groups)
        supernet = cls.__new__(cls)
        supernet._build(model, groups, SizeTable.from_dict(values), basis, values["provenance"])
        for name, schedule in read_schedules(values, directory).items():
            supernet.set_schedule(name, schedule)
        for size, adapter in load_size_adapters(directory, supernet.sizes).items():
            try:
                supernet.set_size_adapter(size, adapter)
            except TypeError as error:
                raise ValueError(f"{directory} has an adapter for size {size:g} that cannot be: {error}") from error
        return supernet

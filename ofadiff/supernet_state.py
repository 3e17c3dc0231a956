"""The sizes of one elastic model, and what it takes to switch between them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ofadiff.adapters.loaded import loaded_adapters
from ofadiff.adapters.size_adapter import SizeAdapter, save_size_adapters
from ofadiff.basis.change import BASIS_NAME, save_basis
from ofadiff.channels import ChannelGroup, Slice
from ofadiff.cutting import kept_by_module
from ofadiff.reading.names import check_stays
from ofadiff.reading.tensors import read_metadata
from ofadiff.size_schedule import SizeSchedule
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.files import add_to_safetensors
from ofadiff.storage.ofa_config import FORMAT_VERSION
from ofadiff.storage.structure import STRUCTURE, WEIGHTS, fingerprint, structure_of


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
        schedules: Sizes over the steps of an image, by their names.
        sides: For every adapter of the original that follows the sizes its layers, see `adopt_adapter`.
        modules: What is inside the model; diffusers may put hooks on any of it.
        size: Size that the model is set to.
        answer: What a call of the model does in place of a forward; it is told the forward and its arguments.
        user: Stands for the innermost block that has the model, see `Supernet.used_at`.
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
        self.schedules: dict[str, SizeSchedule] = {}
        self.sides: dict[str, list[tuple[nn.Module, str, Slice]]] = {}
        self.answer: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any] | None = None
        self.user: object = None
        self.lock = SizeLock()
        self._blocks = [(model.get_submodule(group.block), group) for group in groups if group.resize is not None]
        self.look_up_layers(model)
        # Each size once: an attention that one of them drops gets its class here, before a hook takes its forward.
        for subnet in subnets:
            self.set_size(subnet.size)

    def look_up_layers(self, model: ModelMixin) -> None:
        """Everything that a switch sets or looks at, so that a switch only assigns."""
        self.modules = [module for module in model.modules() if module is not model]
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
        """Sets the layers and blocks to a size; `Supernet.set_size` empties caches too.

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
        schedules = {name: schedule.to_dict() for name, schedule in self.schedules.items()}
        return {
            "format_version": FORMAT_VERSION,
            "groups": [fingerprint(group) for group in self.groups],
            **self.subnets.to_dict(),
            **({"schedules": schedules} if schedules else {}),
            "provenance": self.provenance,
        }

    def write_metadata(self, folder: Path) -> None:
        """Writes `ofa_config.json`, the basis and the adapters of sizes beside the weights, and marks these as theirs.

        Raises:
            ValueError: If weights of another supernet lie there.
        """
        for name in (CONFIG_NAME, BASIS_NAME):
            check_stays(folder / name, folder)
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

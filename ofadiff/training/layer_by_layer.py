"""A model that a device has no room for: it stays in main memory, and each layer is on the device while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ofadiff.importance.matrices import MATRICES
from ofadiff.training.sharding import is_sharded


@contextmanager
def layer_by_layer(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which a model in main memory is called with what lies on a device, and runs there.

    What a module holds itself is copied to the device before its forward and let go after it; a backward copies again
    what it needs, one tensor at a time. Results are those of a model on the device, and the model is as before at the
    end. It costs a transfer of all weights for each forward, and another one for each backward.

    Args:
        model: In main memory. Where there is a backward, its parameters want no gradients.
        device: Where it is to run.
    """
    copies = _Copies(device)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for module in model.modules():
            if type(module).forward is not nn.Module.forward:
                handles.append(module.register_forward_pre_hook(copies.bring))
                handles.append(module.register_forward_hook(copies.let_go, always_call=True))
        with torch.autograd.graph.saved_tensors_hooks(copies.refer, copies.copy_again):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_device(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A block in which a model is called on a process' device: moved there, or layer by layer where FSDP splits it."""
    if is_sharded(accelerator):
        with layer_by_layer(model, accelerator.device):
            yield
    else:
        model.to(accelerator.device)
        yield


@dataclass(frozen=True)
class _Reference:
    """A view of a copy, for a backward: in place of what the copy's memory holds, what it was copied from."""

    original: Tensor
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Copies:
    """What is on the device now.

    Attributes:
        originals: For every module that runs what it holds otherwise: whose, under which name; once per entry.
        copied: What was copied, by the memory of the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.originals: dict[nn.Module, list[list[tuple[nn.Module, str, Tensor]]]] = {}
        self.copied: dict[int, Tensor] = {}

    def bring(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        own = _own_tensors(module)
        self.originals.setdefault(module, []).append(own)
        for holder, name, original in own:
            copy = original.detach().to(self.device, self._dtype(module, original), copy=True)
            self.copied[_memory(copy)] = original.detach()
            # Another parameter, not other data in the same one: a backward may keep it.
            setattr(holder, name, nn.Parameter(copy, False) if isinstance(original, nn.Parameter) else copy)

    def let_go(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.originals.get(module):
            return  # the forward was not reached
        for holder, name, original in self.originals[module].pop():
            self.copied.pop(_memory(getattr(holder, name)))
            setattr(holder, name, original)

    def _dtype(self, module: nn.Module, tensor: Tensor) -> torch.dtype:
        """As autocast would cast it: then that makes no copy of its own, which a backward would keep."""
        kind = self.device.type
        if type(module) in MATRICES and tensor.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return tensor.dtype

    def refer(self, tensor: Tensor) -> Tensor | _Reference:
        """What a forward keeps for its backward."""
        original = self.copied.get(_memory(tensor))
        if original is None:
            return tensor
        return _Reference(original, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def copy_again(self, kept: Tensor | _Reference) -> Tensor:
        """What a backward gets."""
        if isinstance(kept, Tensor):
            return kept
        copy = kept.original.to(self.device, kept.dtype, copy=True)
        return copy.as_strided(kept.size, kept.stride, kept.offset)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _own_tensors(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """What a module holds itself, or in children that have no forward, such as LoRAs of sizes; by holder and name."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    own = [(module, name, tensor) for name, tensor in named if tensor.numel()]
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            own += _own_tensors(child)
    return own

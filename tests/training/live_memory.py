"""Bytes of the tensors that a block of code works on, counted from inside."""

import time
import weakref

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Only more than the most so far by this is a reason to count anew.
WORTH_COUNTING = 2**15
# Seconds, and how often: what a thread of gloo's holds of a collective that has ended, it lets go as soon as it runs.
MOMENT, MOMENTS = 0.002, 100


class LiveMemory(TorchDispatchMode):
    """Counts the memory of every tensor that an operation in the block takes or gives, as long as it is there.

    Of a tensor that is split over processes this one's part counts; memory that FSDP has emptied counts nothing, nor do
    tensors on the meta device, or what only stands for another tensor, such as one that is still being gathered.

    Args:
        held: Tensors that count from the beginning.
        beside: Tensors that do not count.
        patient: Whether to wait for what only a thread holds that has done its part, and not to count it.
    """

    def __init__(self, held=(), beside=(), patient=False):
        super().__init__()
        self.patient = patient
        self.beside = {storage._cdata for tensor in beside for storage in _storages(tensor)}
        self.storages, self.sizes = {}, {}
        # Of all that was seen as large as it then was: no less than there is, as FSDP empties memory unseen.
        self.total = self.most = 0
        for tensor in held:
            self._see(tensor)
        self._count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        moments = MOMENTS if self.patient else 0
        while self.total > self.most + WORTH_COUNTING and moments:
            time.sleep(MOMENT)
            moments -= 1
        if self.total > self.most + WORTH_COUNTING:
            self._count()
        return out

    def _see(self, tensor):
        for storage in _storages(tensor):
            key, size = storage._cdata, storage.nbytes()
            if key in self.beside:
                continue
            if key not in self.storages:
                self.storages[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
            self.total += size - self.sizes.get(key, 0)
            self.sizes[key] = size

    def _forget(self, key):
        self.storages.pop(key, None)
        self.total -= self.sizes.pop(key, 0)

    def _count(self):
        self.sizes = {key: found.nbytes() for key, each in [*self.storages.items()] if (found := each()) is not None}
        self.total = sum(self.sizes.values())
        self.most = max(self.most, self.total)


def _storages(tensor):
    """The memory of a tensor: of one that stands for another the other's, as its own is as large and nowhere."""
    while isinstance(tensor, (DTensor, AsyncCollectiveTensor)):
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor.elem
    return [] if tensor.is_meta else [tensor.untyped_storage()]


def bytes_of(tensors):
    """Of this process' parts of some tensors."""
    return sum(storage.nbytes() for tensor in tensors for storage in _storages(tensor))

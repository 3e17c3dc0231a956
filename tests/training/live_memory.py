"""Bytes of the tensors that a block of code works on, counted from inside."""

import weakref

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Only what is new and larger is a reason to count anew.
WORTH_COUNTING = 2**15


class LiveMemory(TorchDispatchMode):
    """Counts the memory of every tensor that an operation in the block takes or gives, as long as it is there.

    Of a tensor that is split over processes this one's part counts; memory that FSDP has emptied counts nothing.

    Args:
        held: Tensors that count from the beginning.
        beside: Tensors that do not count.
    """

    def __init__(self, held=(), beside=()):
        super().__init__()
        self.beside = {_storage(tensor)._cdata for tensor in beside}
        self.storages, self.sizes = {}, {}
        self.most = 0
        for tensor in held:
            self._see(tensor)
        self._count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = [self._see(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if max(seen, default=0) > WORTH_COUNTING:
            self._count()
        return out

    def _see(self, tensor):
        """Returns how much there is of it that was not there before."""
        storage = _storage(tensor)
        key, size = storage._cdata, storage.nbytes()
        if key in self.beside:
            return 0
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        before, self.sizes[key] = self.sizes.get(key, 0), size
        return size - before

    def _forget(self, key):
        self.storages.pop(key, None)
        self.sizes.pop(key, None)

    def _count(self):
        self.sizes = {key: found.nbytes() for key, each in [*self.storages.items()] if (found := each()) is not None}
        self.most = max(self.most, sum(self.sizes.values()))


def _storage(tensor):
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def bytes_of(tensors):
    """Of this process' parts of some tensors."""
    return sum(_storage(tensor).nbytes() for tensor in tensors)

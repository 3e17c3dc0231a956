"""The part of an evaluation that falls to one process."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ofadiff.reading.arguments import check_argument

T = TypeVar("T")


def check_accelerator(accelerator: Any) -> None:
    """Raises ValueError unless it is one, or None."""
    known = accelerator is None or isinstance(accelerator, Accelerator)
    check_argument("accelerator", accelerator, known, "an accelerate.Accelerator, or None")


class Processes:
    """The processes that share the work: an accelerator's, or without one this process alone.

    What is gathered or broadcast, all of them have to take part in.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.index = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.is_main = self.index == 0
        self._accelerator = accelerator

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, everywhere."""
        return gather_object(items) if self.count > 1 else items

    def broadcast(self, value: T) -> T:
        """The main process' value, everywhere."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def wait(self) -> None:
        """Until all processes have come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def main_first(self) -> contextlib.AbstractContextManager[None]:
        """A block that the main process of each machine runs before the others, which then find what it downloaded."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.local_main_process_first()


class Share:
    """Every so-manieth batch of `range(total)`.

    The batches are the same however many processes there are, and so is what is computed from them, to the last bit.

    Attributes:
        batches: The indices of this process' batches.
        indices: All of them.
    """

    def __init__(self, total: int, batch_size: int, processes: Processes) -> None:
        batches = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
        self.processes = processes
        self.batches = batches[processes.index :: processes.count]
        self.indices = [index for batch in self.batches for index in batch]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One value per index `(len(indices), …)` to those of all processes `(total, …)`, in order."""
        parts: list[Any] = self.processes.gather([(self.indices, values.cpu())])
        parts = [part for part in parts if part[0]]  # a process without a batch knows no shapes either
        order = torch.tensor([index for indices, _ in parts for index in indices]).argsort()
        return torch.cat([part for _, part in parts])[order]

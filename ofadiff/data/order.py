"""Which samples make up a step, and in which order.

A sample is asked for by a key `(index, seed)`: the image, and the seed of everything random about this use of it (its
flip, noise and timestep). The keys of a step are a pure function of the run's seed and the step, so a resumed run goes
on exactly where it stopped, and a step is the same however it is split over processes and micro-steps.
"""

from __future__ import annotations

import functools
import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ofadiff.data.mixed_samples import MixedSamples
from ofadiff.recordings.samples import RecordedSamples

Key = tuple[int, int]


class Samples(Protocol):
    """What can be trained on: `data[index, seed]` is a dict of tensors and numbers, the seed under `seeds`."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> dict[str, Any]: ...


def hold_out(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits `range(count)` into a training and a validation part, the latter a random `fraction` of at least one.

    Raises:
        ValueError: If the fraction is not in [0, 1), or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; it must be at least 0 and below 1")
    held_out = max(1, round(count * fraction)) if fraction else 0
    if held_out >= count:
        raise ValueError(f"a validation fraction of {fraction} of {count} leaves none to train on")
    order = draw_order(count, f"{seed} hold out")
    return sorted(order[held_out:]), sorted(order[:held_out])


def draw_keys(count: int, positions: range, seed: int, purpose: str = "training") -> list[Key]:
    """Keys of the samples at some positions of an endless stream over a data set, each epoch in a new order.

    A pure function of its arguments.

    Args:
        count: Samples of the data set.
        positions: Places in the stream; the samples of step s are `range(s * batch, (s + 1) * batch)`.
        seed: The run's seed.
        purpose: Streams of different purposes are independent.
    """
    keys = []
    for position in positions:
        epoch, place = divmod(position, count)
        order = draw_order(count, f"{seed} {purpose} epoch {epoch}")
        keys.append((order[place], draw_seed(seed, purpose, position)))
    return keys


def draw_seed(seed: int, purpose: str, position: int) -> int:
    """Seed of the sample at a position of a stream."""
    return random.Random(f"{seed} {purpose} sample {position}").getrandbits(63)


@functools.lru_cache(maxsize=8)
def draw_order(count: int, name: str) -> list[int]:
    """The numbers below `count` in an order that only depends on the name."""
    order = list(range(count))
    random.Random(name).shuffle(order)
    return order


def step_batches(
    count: int, steps: range, micro_steps: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> Iterator[list[Key]]:
    """Keys of one process' batches, `micro_steps` of them for each optimizer step.

    The processes' batches of all micro-steps together are the step's `micro_steps * processes * batch_size` samples.
    """
    per_step = micro_steps * processes * batch_size
    for step in steps:
        keys = draw_keys(count, range(step * per_step, (step + 1) * per_step), seed)
        for micro_step in range(micro_steps):
            yield keys[share_of_step(micro_step, batch_size, process, processes)]


def share_of_step(micro_step: int, batch_size: int, process: int, processes: int) -> slice:
    """Which of a step's samples are the batch of one micro-step on one process."""
    first = (micro_step * processes + process) * batch_size
    return slice(first, first + batch_size)


def load_batches(data: Samples, batches: Iterable[Sequence[Key]], num_workers: int = 0) -> DataLoader[dict[str, Any]]:
    """Loads batches of keys, in order; each is a dict of tensors with the samples stacked, or of recorded calls."""
    collate = data.collate if isinstance(data, RecordedSamples | MixedSamples) else None
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=collate is None and torch.cuda.is_available(),
        worker_init_fn=leave_signals,
    )


def leave_signals(worker: int) -> None:
    """In a process that loads images: what a terminal or SLURM sends to all is for the one that trains to hear."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("SIGINT", "SIGUSR1"):
        if name in signal.Signals.__members__:
            signal.signal(signal.Signals[name], signal.SIG_IGN)


def fixed_batches(
    data: Samples, samples: int, batch_size: int, seed: int, purpose: str, process: int = 0, processes: int = 1
) -> DataLoader[dict[str, Any]]:
    """`samples` samples of a data set in batches, the same ones every time; of several processes, this one's share.

    All images come up equally often, give or take one, each time with other noise and another timestep.
    """
    keys = draw_keys(len(data), range(samples), seed, purpose)[process::processes]
    return load_batches(data, [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)])

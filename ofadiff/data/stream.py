"""Images with captions that arrive one after another, such as webdataset shards: a stream has no length and no index.

Their order is a pure function of the seed: the shards in a new order every epoch, and their samples shuffled within
blocks of `buffer_size`. Every process reads the whole stream and keeps its own samples of each step, so a step is the
same however it is split; and where a block began is known, so a resumed run reads at most one shard and one block
before it goes on exactly where it stopped. (A stream of `datasets` can be resumed too, but its shuffle buffer is then
filled with other samples.)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from ofadiff.data.images import reason_of
from ofadiff.data.order import draw_order, draw_seed
from ofadiff.data.shards import ERROR, URL, Example

Place = tuple[int, int, int, int]  # a block of the stream; the epoch, the shard in it and the sample where it begins
StreamKey = tuple[Example, int, Place]

START: Place = (0, 0, 0, 0)


class Stream:
    """The examples of a streaming data set, epoch after epoch without end, shuffled.

    Args:
        dataset: A `datasets.IterableDataset`, or `TarShards`; it is not shuffled yet.
        seed: Decides the order in which they come up.
        held_out: So many examples, the first of the data set, never come up; see the attribute of that name.
        buffer_size: Examples that are shuffled among each other, and kept in memory.

    Attributes:
        held_out: These examples.

    Raises:
        ValueError: If no example is left.
    """

    def __init__(self, dataset: Any, seed: int, held_out: int = 0, buffer_size: int = 1000) -> None:
        self.dataset = dataset
        self.seed = seed
        self.buffer_size = buffer_size
        self.held_out: list[Example] = []
        self._skipped = [0] * dataset.num_shards
        for shard in range(dataset.num_shards):
            taken = list(itertools.islice(self._shard(shard), held_out - len(self.held_out)))
            self._skipped[shard] = len(taken)
            self.held_out += taken
            if len(self.held_out) == held_out:
                break
        next(self._examples(0, 0, 0))

    def __str__(self) -> str:
        held_out = len(self.held_out)
        return f"{self.dataset.num_shards} shards, {held_out} held out, shuffled over {self.buffer_size}"

    def first(self, count: int) -> list[Example]:
        """The first examples of the first epoch, not shuffled: `count`, or all if there are fewer."""
        first_epoch = itertools.takewhile(lambda found: found[1][0] == 0, self._examples(0, 0, 0))
        return [example for example, _ in itertools.islice(first_epoch, count)]

    def read(self, place: Place = START) -> Iterator[tuple[Example, Place]]:
        """Shuffled examples from the start of a block on, each with the place of its block."""
        block, *start = place
        source = self._examples(*start)
        following = list(itertools.islice(source, self.buffer_size))
        while True:
            examples, following = following, []
            end = examples[-1][1]
            random.Random(f"{self.seed} block {block}").shuffle(examples)
            while examples:
                yield examples.pop()[0], (block, start[0], start[1], start[2])
                following.append(next(source))
            block, start = block + 1, list(end)

    def _examples(self, epoch: int, shard: int, offset: int) -> Iterator[tuple[Example, tuple[int, int, int]]]:
        """From a place on, in the order in which they are read; each with the place behind it."""
        while True:
            order = draw_order(self.dataset.num_shards, f"{self.seed} shards epoch {epoch}")
            found = shard or offset
            for place in range(shard, self.dataset.num_shards):
                rest = self._shard(order[place], self._skipped[order[place]] + offset)
                for found, example in enumerate(rest, offset + 1):
                    yield example, (epoch, place, found)
                offset = 0
            if not found:
                raise ValueError(f"no sample is left to train on: {len(self.held_out)} are held out for validation")
            epoch, shard = epoch + 1, 0

    def _shard(self, index: int, first: int = 0) -> Iterator[Example]:
        return itertools.islice(self._whole_shard(index), first, None)

    def _whole_shard(self, index: int) -> Iterator[Example]:
        """A shard's examples; where it cannot be read on, the last one says so."""
        try:
            yield from self.dataset.shard(self.dataset.num_shards, index)
        except Exception as error:  # readers raise whatever they like, and would end the run after days
            yield {URL: f"shard {index}", ERROR: reason_of(error)}


class StreamBatches(IterableDataset[list[StreamKey]]):
    """Reads a stream, in a process of its own if a loader gives it one."""

    def __init__(
        self, stream: Stream, place: Place, steps: range, per_step: int, batch_size: int, process: int, processes: int
    ) -> None:
        self.stream = stream
        self.place = place
        self.positions = range(steps.start * per_step, steps.stop * per_step)
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[StreamKey]]:
        before = self.positions.start - self.place[0] * self.stream.buffer_size
        keys: list[StreamKey] = []
        for position, (example, place) in zip(
            self.positions, itertools.islice(self.stream.read(self.place), before, None), strict=False
        ):
            if position // self.batch_size % self.processes == self.process:
                keys.append((example, draw_seed(self.stream.seed, "training", position), place))
            if len(keys) == self.batch_size:
                yield keys
                keys = []

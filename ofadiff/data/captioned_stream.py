"""Images and captions of a stream as samples of a batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.captions import caption_choices, column_path, find_entry
from ofadiff.data.decoding import decode_image, open_image
from ofadiff.data.hub_datasets import datasets_library
from ofadiff.data.images import NAMED, Images, reason_of
from ofadiff.data.order import leave_signals
from ofadiff.data.shards import ERROR, KEY, URL, Example, TarShards, decode_column
from ofadiff.data.stream import Place, Stream, StreamBatches, StreamKey

SPARES = 64

# A share of fewer samples than these says little.
ENOUGH = 100
logger = logging.getLogger(__name__)


class TextToImageStream(Dataset[dict[str, Any]]):
    """Images and captions of a stream as samples of a batch, which are those of a `TextToImageData`.

    A sample that cannot be read is named in a warning (the first ones of each process), and one of the first that can
    be takes its place. What a sample has beside that is `place`, from which the stream can be read on, and
    `unreadable`, 1 where another took its place.

    Args:
        dataset: A `datasets.IterableDataset`, or `TarShards`.
        image_column: Its column of images.
        caption_column: Its column of captions: strings, or lists of strings; `json.text` is an entry of a column.
        seed: Decides the order in which samples come up.
        held_out: As many examples, the first ones, are left for validation.
        buffer_size: As in `Stream`.
        resolution: As in `TextToImageData`.
        max_unreadable: The share of samples that may be unreadable before `check_unreadable` raises, in [0, 1].
        **options: As in `TextToImageData`.

    Raises:
        ValueError: If the data set has no such columns, or none of its first samples can be read.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        caption_column: str,
        seed: int,
        held_out: int,
        buffer_size: int,
        resolution: int,
        max_unreadable: float = 0.1,
        **options: Any,
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"the largest share of unreadable samples is {max_unreadable}; it must lie in [0, 1]")
        features = dataset.features or {}
        if not isinstance(dataset, TarShards):
            datasets = datasets_library()
            if isinstance(features.get(image_column), datasets.Image):
                dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        if image_column not in features or features[image_column] is False:
            columns = ", ".join(features) or "unknown"
            raise ValueError(f"the data set has no column {image_column!r} of images; its columns: {columns}")
        self.path = column_path(list(features), caption_column)
        self.image_column = image_column
        self.resolution = resolution
        self.options = options
        self.max_unreadable = max_unreadable
        self.warnings = 0
        self.stream = Stream(dataset, seed, held_out, buffer_size)
        self.spares = self._readable(self.stream.first(SPARES))
        self._in_memory(self.spares[:1], **options)  # what is wrong with the options is found out now

    def first(self, count: int) -> TextToImageData:
        """The first samples, in memory; those that cannot be read are left out."""
        return self._in_memory(self._readable(self.stream.first(count)), **self.options)

    def held_out(self) -> TextToImageData | None:
        """The samples for validation, in memory and cropped at the centre; those that cannot be read are left out."""
        if not self.stream.held_out:
            return None
        return self._in_memory(self._readable(self.stream.held_out), center_crop=True)

    def check_unreadable(self, count: int, of: int) -> None:
        """Raises RuntimeError if a larger share of the samples than `max_unreadable` could not be read.

        Args:
            count: Samples that could not be read.
            of: Samples that were asked for; nothing is said of fewer than `ENOUGH`.
        """
        if of >= ENOUGH and count > self.max_unreadable * of:
            raise RuntimeError(
                f"{count} of {of} samples of the stream cannot be read, which is more than {self.max_unreadable:.0%}; "
                "see the warnings, mend the data, or allow a larger share with --max_unreadable_fraction"
            )

    def batches(
        self, place: Place, steps: range, micro_steps: int, batch_size: int, process: int, processes: int
    ) -> IterableDataset[list[StreamKey]]:
        """Keys of one process' batches, as `step_batches` gives them for data that have an index.

        Args:
            place: Place of some sample before these steps, or `START`.
            steps: Optimizer steps.
            micro_steps: Batches of each step and process.
            batch_size: Samples of a batch.
            process: Number of this process.
            processes: How many there are.
        """
        return StreamBatches(
            self.stream, place, steps, micro_steps * processes * batch_size, batch_size, process, processes
        )

    def __getitem__(self, key: StreamKey) -> dict[str, Any]:
        example, seed, place = key
        own = self._decode(example)
        found = own or self._decode(self.spares[seed % len(self.spares)])
        assert found is not None  # a spare was read before
        image, captions = found
        data = TextToImageData(Images([""], lambda index: image), [captions], self.resolution, **self.options)
        return {**data[0, seed], "place": torch.tensor(place), "unreadable": int(own is None)}

    def _decode(self, example: Example) -> tuple[Image.Image, tuple[str, ...]] | None:
        """The image and its captions; None, with a warning, if there is no such thing."""
        try:
            return self._image(example), self._captions(example)
        except Exception as error:  # decoders raise whatever they like
            self.warnings += 1
            if self.warnings <= NAMED:
                last = "; others that follow are counted and no longer named" if self.warnings == NAMED else ""
                what = "to its end" if ERROR in example else "and is left out"
                logger.warning("%s cannot be read %s: %s%s", _name(example), what, reason_of(error), last)
            return None

    def _image(self, example: Example) -> Image.Image:
        value = decode_column(example, self.image_column)
        if value is None:
            raise ValueError(f"it has no image {self.image_column!r}")
        with open_image(value) as image:
            return decode_image(image)

    def _captions(self, example: Example) -> tuple[str, ...]:
        column, *inner = self.path
        return caption_choices(find_entry(decode_column(example, column), inner))

    def _readable(self, examples: Sequence[Example]) -> list[Example]:
        readable = [example for example in examples if self._decode(example) is not None]
        if not readable:
            raise ValueError(
                f"none of the stream's first {len(examples)} samples has a readable image {self.image_column!r} and a "
                f"caption {'.'.join(self.path)!r}"
            )
        return readable

    def _in_memory(self, examples: Sequence[Example], **options: Any) -> TextToImageData:
        images = Images([_name(example) for example in examples], functools.partial(self._row, examples))
        return TextToImageData(images, [self._captions(each) for each in examples], self.resolution, **options)

    def _row(self, examples: Sequence[Example], index: int) -> Image.Image:
        return self._image(examples[index])


def load_stream(
    data: TextToImageStream, batches: IterableDataset[list[StreamKey]], num_workers: int = 0
) -> DataLoader[dict[str, Any]]:
    """Loads batches of keys, in order; with workers, one more process reads the stream."""
    options: dict[str, Any] = {"worker_init_fn": leave_signals}
    keys = DataLoader(batches, batch_size=None, num_workers=min(num_workers, 1), collate_fn=_as_it_is, **options)
    options["pin_memory"] = torch.cuda.is_available()
    return DataLoader(data, batch_sampler=keys, num_workers=num_workers, **options)


def _as_it_is(keys: list[StreamKey]) -> list[StreamKey]:
    return keys


def _name(example: Example) -> str:
    if KEY in example:
        return f"{example[KEY]} in {example[URL]}"
    return str(example.get(URL, "a sample of the stream"))

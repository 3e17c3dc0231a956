"""Images to train on, and which of them make up a step.

A sample is asked for by a key `(index, seed)`: the image, and the seed of everything random about this use of it (its
flip, noise and timestep). The keys of a step are a pure function of the run's seed and the step, so a resumed run goes
on exactly where it stopped, and a step is the same however it is split over processes and micro-steps.
"""

from __future__ import annotations

import functools
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

Key = tuple[int, int]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NAMED = 10


@dataclass(frozen=True)
class Images:
    """Where images come from.

    Attributes:
        names: What to call each image in a message.
        load: Image of an index.
        labels: Class of each image, or None where there are none.
    """

    names: Sequence[str]
    load: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None


def image_folder(folder: str | Path) -> Images:
    """The images below a folder, in alphabetical order.

    Where all of them lie in subfolders, each subfolder is a class, numbered alphabetically from 0.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)
    if not paths:
        raise ValueError(f"{folder} holds no images, such as .png or .jpg files")
    classes = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in paths]
    labels = None
    if None not in classes:
        number = {name: label for label, name in enumerate(sorted(set(classes), key=str))}
        labels = [number[name] for name in classes]
    return Images([str(path) for path in paths], functools.partial(_open, paths), labels)


def _open(paths: Sequence[Path], index: int) -> Image.Image:
    return Image.open(paths[index])


def dataset_images(dataset: Any, image_column: str = "image", label_column: str | None = None) -> Images:
    """The images of one split of a `datasets` data set.

    Args:
        dataset: A `datasets.Dataset`.
        image_column: Its column of images.
        label_column: Its column of integer classes, or None for images without labels.

    Raises:
        ValueError: If there is no such column, or its values are no classes.
    """
    for column in filter(None, (image_column, label_column)):
        if column not in dataset.column_names:
            raise ValueError(f"the data set has no column {column!r}; its columns: {', '.join(dataset.column_names)}")
    labels = None if label_column is None else list(dataset[label_column])
    if labels is not None and not all(isinstance(label, int) for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int))
        raise ValueError(f"column {label_column!r} holds {wrong!r}; class labels must be whole numbers")
    names = [f"row {index}" for index in range(len(dataset))]
    return Images(names, functools.partial(_row_image, dataset, image_column), labels)


def _row_image(dataset: Any, image_column: str, index: int) -> Image.Image:
    return dataset[index][image_column]


def load_dataset_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    data_files: Sequence[str] | None = None,
    streaming: bool = False,
) -> Any:
    """One split of a `datasets` data set.

    Args:
        name: A name on the hub, a folder of files or one made by `save_to_disk`, or a format such as `webdataset`.
        config: Configuration of the data set.
        split: What to load of it.
        cache_dir: Where what is downloaded is kept.
        data_files: Its files: paths, addresses, patterns, numbered ones such as `{000..099}.tar`.
        streaming: Whether to get a `datasets.IterableDataset`, which is read while it is used.

    Raises:
        ValueError: If it cannot be loaded, or has no such split.
    """
    import datasets  # an extra: an image folder needs no more than Pillow

    saved, saved_splits = (Path(name) / "state.json").is_file(), (Path(name) / "dataset_dict.json").is_file()
    if streaming and (saved or saved_splits):
        raise ValueError(f"{name} was made by save_to_disk, which is never read as a whole: it needs no streaming")
    files = [file for pattern in data_files or [] for file in numbered_files(pattern)] or None
    try:
        if saved:
            return datasets.load_from_disk(name)
        if not saved_splits:
            options = {"data_files": files, "cache_dir": cache_dir, "streaming": streaming}
            return datasets.load_dataset(name, config, split=split, **options)
        splits = datasets.load_from_disk(name)
    except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot load the data set {name!r}: {' '.join(str(error).split())}") from error
    if split not in splits:
        raise ValueError(f"the data set {name!r} has no split {split!r}; its splits: {', '.join(splits)}")
    return splits[split]


def numbered_files(pattern: str) -> list[str]:
    """What `{000..099}` in a name stands for, as in a shell; a name without it stands for itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + pattern[found.end() :] for number in numbers]


class _Readable(Dataset[bool]):
    """Whether each image can be decoded to its last byte."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> bool:
        try:
            with self.images.load(index) as image:
                image.load()
        except Exception:  # decoders raise whatever they like; the caller counts and names the images
            return False
        return True


def check_images(
    images: Images,
    num_workers: int = 0,
    progress: bool = False,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[list[str]], list[str]] = list,
) -> None:
    """Decodes every image once, so that a broken one is found before training and not hours later.

    Args:
        images: What to check.
        num_workers: Processes that decode them.
        progress: Whether to show a bar.
        process: Number of this process; of several, each takes its share.
        processes: How many there are.
        gather: Joins the lists of all processes, so that all of them raise; accelerate's `gather_object`.

    Raises:
        ValueError: If some cannot be read: says how many and names the first of them.
    """
    share = range(process, len(images.names), processes)
    loader = DataLoader(_Readable(images), batch_size=None, sampler=share, num_workers=num_workers)
    readable = tqdm(loader, "Checking images", disable=not progress)
    broken = gather([images.names[index] for index, good in zip(share, readable, strict=True) if not good])
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise ValueError(
            f"{len(broken)} of {len(images.names)} images cannot be read: {', '.join(broken[:NAMED])}{more}"
        )


class Samples(Protocol):
    """What can be trained on: `data[index, seed]` is a dict of tensors and numbers, the seed under `seeds`."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> dict[str, Any]: ...


class ImageData(Dataset[dict[str, Any]]):
    """Images as samples of a batch: `data[index, seed]` is one sample.

    A sample has `pixel_values`, `(channels, resolution, resolution)` in [-1, 1], its `seeds` entry, and `class_labels`
    if the images have labels. Images are resized and centre-cropped to a square.

    Args:
        images: Where they come from.
        resolution: Side of the square, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        random_flip: Whether half of the samples are mirrored.
        indices: Which of the images, all by default.

    Raises:
        ValueError: If there is no image mode with so many channels, or no image.
    """

    def __init__(
        self,
        images: Images,
        resolution: int,
        channels: int,
        random_flip: bool = False,
        indices: Sequence[int] | None = None,
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"images cannot have {channels} channels; accepted: {', '.join(map(str, MODES))}")
        self.images = images
        self.resolution = resolution
        self.mode = MODES[channels]
        self.random_flip = random_flip
        self.indices = range(len(images.names)) if indices is None else indices
        if not self.indices:
            raise ValueError("there are no images to train on")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, seed = self.indices[key[0]], key[1]
        with self.images.load(index) as original:
            image = original.convert(self.mode)
        image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
        if self.random_flip and random.Random(seed).random() < 0.5:
            image = ImageOps.mirror(image)
        sample = {"pixel_values": pil_to_tensor(image).float() / 127.5 - 1, "seeds": seed}
        if self.images.labels is not None:
            sample["class_labels"] = self.images.labels[index]
        return sample


def hold_out(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits `range(count)` into a training and a validation part, the latter a random `fraction` of at least one.

    Raises:
        ValueError: If the fraction is not in [0, 1), or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; it must be at least 0 and below 1")
    held_out = max(1, round(count * fraction)) if fraction else 0
    if held_out >= count:
        raise ValueError(f"a validation fraction of {fraction} of {count} images leaves none to train on")
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
            first = (micro_step * processes + process) * batch_size
            yield keys[first : first + batch_size]


def load_batches(data: Samples, batches: Iterable[Sequence[Key]], num_workers: int = 0) -> DataLoader[dict[str, Any]]:
    """Loads batches of keys, in order; each is a dict of tensors with the samples stacked."""
    return DataLoader(data, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())


def fixed_batches(
    data: Samples, samples: int, batch_size: int, seed: int, purpose: str, process: int = 0, processes: int = 1
) -> DataLoader[dict[str, Any]]:
    """`samples` samples of a data set in batches, the same ones every time; of several processes, this one's share.

    All images come up equally often, give or take one, each time with other noise and another timestep.
    """
    keys = draw_keys(len(data), range(samples), seed, purpose)[process::processes]
    return load_batches(data, [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)])

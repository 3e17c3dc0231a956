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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from ofadiff.data.decoding import decode_image, open_image
from ofadiff.data.shards import TarShards

Key = tuple[int, int]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NAMED = 10

# Folders of these names hold splits of a data set, as `datasets` takes them.
SPLITS = {
    *("train", "training"),
    *("validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Images:
    """Where images come from.

    Attributes:
        names: What to call each image in a message.
        load: Image of an index.
        labels: Class of each image, or None where there are none.
        classes: What each class is called, by its label; None where they have no names.
    """

    names: Sequence[str]
    load: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    classes: Mapping[int, str] | None = None

    def decoded(self, index: int, mode: str) -> Image.Image:
        """The image of an index as `decode_image` gives it, in a mode.

        Raises:
            ValueError: If it cannot be read; names it and says why.
        """
        try:
            with self.load(index) as image:
                return decode_image(image, mode)
        except Exception as error:  # decoders raise whatever they like
            raise ValueError(f"{self.names[index]} cannot be read: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def image_folder(folder: str | Path) -> Images:
    """The images below a folder, in alphabetical order; what is hidden is left out, links are followed.

    Where all of them lie in subfolders, each subfolder is a class. If their names are whole numbers, these are the
    labels, as a pretrained model counts its classes; otherwise they are numbered alphabetically from 0.

    Raises:
        ValueError: If there is no such folder, no image in it, or two subfolders of the same number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images, such as .png or .jpg files")
    names = [path.relative_to(folder).parts[0] for path in paths if path.parent != folder]
    labels = classes = None
    if len(names) == len(paths):
        classes = _number_classes(sorted(set(names)), folder)
        number = {name: label for label, name in classes.items()}
        labels = [number[name] for name in names]
    return Images([str(path) for path in paths], functools.partial(_open, paths), labels, classes)


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, in alphabetical order: none that is hidden, those behind links too."""
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    return [path for path in find_files(folder) if path.suffix.lower() in extensions]


def find_files(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """The files below a folder, in alphabetical order: none that is hidden, those behind links too.

    Args:
        folder: Where to look.
        above: The real folders that lead there; a link back to one of them is not followed.
    """
    real = folder.resolve()
    if real in above:
        return []
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith((".", "__")):
            found += find_files(entry, above | {real}) if entry.is_dir() else [entry]
    return found


def _number_classes(names: Sequence[str], folder: Path) -> dict[int, str]:
    """What folders of classes are called, by label."""
    if not all(name.isdecimal() for name in names):
        return dict(enumerate(names))
    classes: dict[int, str] = {}
    for name in names:
        if classes.setdefault(int(name), name) != name:
            raise ValueError(f"{folder} has {classes[int(name)]} and {name}, which are the same class number")
    return dict(sorted(classes.items()))


def _open(paths: Sequence[Path], index: int) -> Image.Image:
    return open_image(paths[index])


def dataset_images(dataset: Any, image_column: str = "image", label_column: str | None = None) -> Images:
    """The images of one split of a `datasets` data set.

    Args:
        dataset: A `datasets.Dataset`, in whatever format.
        image_column: Its column of images: `datasets`' own, or whatever `open_image` takes.
        label_column: Its column of integer classes, or None for images without labels.

    Raises:
        ValueError: If there is no such column, or its values are no classes.
    """
    dataset = as_stored(dataset, image_column)
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
    return open_image(dataset[index][image_column])


def as_stored(dataset: Any, image_column: str) -> Any:
    """A data set whose rows are plain Python values, and images the files that they were: `decode_image` decodes."""
    import datasets

    dataset = dataset.with_format(None)
    if isinstance((dataset.features or {}).get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def load_dataset_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    data_files: Sequence[str] | None = None,
    streaming: bool = False,
) -> Any:
    """One split of a `datasets` data set.

    In a folder of images `datasets` takes the words in file names for splits, and would leave out every file but
    `train.png`. Here only folders are splits, if all images lie in such; otherwise all images are used.

    Args:
        name: A name on the hub, a folder of files or one made by `save_to_disk`, or a format such as `webdataset`.
        config: Configuration of the data set.
        split: What to load of it.
        cache_dir: Where what is downloaded is kept.
        data_files: Its files: paths, addresses, patterns, numbered ones such as `{000..099}.tar`.
        streaming: Whether to get a `datasets.IterableDataset`, or `TarShards`, which are read while they are used.

    Raises:
        ValueError: If it cannot be loaded, has no such split, or some of a folder's files would be left out.
    """
    import datasets  # an extra: an image folder needs no more than Pillow
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    saved, saved_splits = (Path(name) / "state.json").is_file(), (Path(name) / "dataset_dict.json").is_file()
    if streaming and (saved or saved_splits):
        raise ValueError(f"{name} was made by save_to_disk, which is never read as a whole: it needs no streaming")
    files: Any = [file for pattern in data_files or [] for file in numbered_files(pattern)] or None
    if files is None and Path(name).is_dir() and not (saved or saved_splits):
        files = files_of_folder(Path(name), split)
    try:
        if saved:
            return datasets.load_from_disk(name)
        if not saved_splits:
            options = {"data_files": files, "cache_dir": cache_dir}
            if streaming:
                builder = datasets.load_dataset_builder(name, config, **options)
                if isinstance(builder, WebDataset):
                    return TarShards([str(file) for file in builder.config.data_files[split]])
            return datasets.load_dataset(name, config, split=split, streaming=streaming, **options)
        splits = datasets.load_from_disk(name)
    except KeyError as error:
        raise ValueError(f"the data set {name!r} has no split {split!r}") from error
    except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot load the data set {name!r}: {reason_of(error)}") from error
    if split not in splits:
        raise ValueError(f"the data set {name!r} has no split {split!r}; its splits: {', '.join(splits)}")
    return splits[split]


def files_of_folder(folder: Path, split: str) -> dict[str, list[str]] | None:
    """What `datasets` is to read of a folder; None where it takes the files that are meant by itself.

    Raises:
        ValueError: If some of its files are named like a split and others are not: only those would be read.
    """
    images = find_images(folder)
    if images:
        in_splits = [bool(SPLITS & {part.lower() for part in path.relative_to(folder).parts[:-1]}) for path in images]
        return None if all(in_splits) else {split: [str(folder / "**")]}
    data = [path for path in find_files(folder) if path.suffix in (".parquet", ".arrow", ".csv", ".jsonl", ".tar")]
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in data}
    others = [path.name for path, found in words.items() if not SPLITS & found]
    if others and len(others) < len(data):
        raise ValueError(
            f"{folder} has files that are named like a split, and others: {others[0]} would be left out; say which "
            "ones are meant with --dataset_data_files"
        )
    return None


def numbered_files(pattern: str) -> list[str]:
    """What `{000..099}` in a name stands for, as in a shell; a name without it stands for itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + pattern[found.end() :] for number in numbers]


class _Unreadable(Dataset[str]):
    """Why each image cannot be decoded to its last byte; nothing where it can."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> str:
        try:
            with self.images.load(index) as image:
                decode_image(image)
        except Exception as error:  # decoders raise whatever they like
            return reason_of(error)
        return ""


def check_images(
    images: Images,
    num_workers: int = 0,
    progress: bool = False,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[list], list] = list,
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
        ValueError: If some cannot be read: says how many, names the first of them, and why.
    """
    share = range(process, len(images.names), processes)
    loader = DataLoader(_Unreadable(images), batch_size=None, sampler=share, num_workers=num_workers)
    reasons = zip(share, tqdm(loader, "Checking images", disable=not progress), strict=True)
    broken = gather([(images.names[index], reason) for index, reason in reasons if reason])
    if broken:
        names = ", ".join(name for name, _ in broken[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        count = f"{len(broken)} of {len(images.names)}"
        raise ValueError(f"{broken[0][1]} ({broken[0][0]}): {count} images cannot be read: {names}{more}")


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
        image = self.images.decoded(index, self.mode)
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

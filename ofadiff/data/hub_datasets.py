"""Data sets of the `datasets` library: one split of one, and its images."""

from __future__ import annotations

import functools
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ofadiff.data.decoding import open_image
from ofadiff.data.images import Images, find_files, find_images, reason_of
from ofadiff.data.shards import TarShards

# Files that a pattern with numbers may stand for.
MOST_FILES = 1_000_000

# Folders of these names hold splits of a data set, as `datasets` takes them.
SPLITS = {
    *("train", "training"),
    *("validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
}


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


def datasets_library() -> Any:
    """The library itself, an extra: a folder of images needs no more than Pillow.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data sets are read with datasets: pip install ofadiff[train]") from error
    return datasets


def as_stored(dataset: Any, image_column: str) -> Any:
    """A data set whose rows are plain Python values, and images the files that they were: `decode_image` decodes."""
    datasets = datasets_library()
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
    datasets = datasets_library()
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    saved, saved_splits = (Path(name) / "state.json").is_file(), (Path(name) / "dataset_dict.json").is_file()
    if streaming and (saved or saved_splits):
        raise ValueError(f"{name} was made by save_to_disk, which is never read as a whole: it needs no streaming")
    files: Any = [file for pattern in data_files or [] for file in numbered_files(pattern)] or None
    if files is None and Path(name).is_dir() and not (saved or saved_splits):
        files = files_of_folder(Path(name), split)
    try:
        if saved:
            return datasets.load_from_disk(str(name))
        if not saved_splits:
            options = {"data_files": files, "cache_dir": cache_dir}
            if streaming:
                builder = datasets.load_dataset_builder(name, config, **options)
                if isinstance(builder, WebDataset):
                    return TarShards([str(file) for file in builder.config.data_files[split]])
            return datasets.load_dataset(name, config, split=split, streaming=streaming, **options)
        splits = datasets.load_from_disk(str(name))
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
        # A relative pattern would be looked for inside the folder, not beside it.
        return None if all(in_splits) else {split: [str(folder.absolute() / "**")]}
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
    """What `{000..099}` in a name stands for, as in a shell; a name without it stands for itself.

    Raises:
        ValueError: If the second number is less than the first, or there are far too many.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < MOST_FILES:
        raise ValueError(f"{pattern} stands for no files, or for more than {MOST_FILES:,}; write it as in {{000..099}}")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + pattern[found.end() :] for number in numbers]

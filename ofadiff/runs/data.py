"""The images of a run: read, checked, and held out for validation."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ofadiff.data import order
from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.captioned_stream import TextToImageStream
from ofadiff.data.captions import dataset_captions
from ofadiff.data.decoding import DECODING
from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import NAMED, Images, check_images, image_folder
from ofadiff.data.latent_cache import LatentCache, LatentData
from ofadiff.data.order import Samples
from ofadiff.denoisers.encoder import Encoder
from ofadiff.denoisers.kind import CAPTIONS
from ofadiff.denoisers.original import Original
from ofadiff.dtypes import dtype_name
from ofadiff.runs.settings import Data, RunSettings


@dataclass(frozen=True)
class RunData:
    """What a run is trained and validated on."""

    training: Samples | TextToImageStream
    validation: Samples | None


def load_data(settings: RunSettings, original: Original, accelerator: Accelerator) -> RunData:
    """Training and validation images with their labels or captions, all of them checked, but of a stream.

    Raises:
        ValueError: If they cannot be read, or do not fit the model.
    """
    resolution = original.resolution(settings.data.resolution)
    if (settings.data.train_data_dir is None) == (settings.data.dataset_name is None):
        raise ValueError("give the images with one of --train_data_dir and --dataset_name")
    load = _load_captioned if original.kind.condition == CAPTIONS else _load_labelled
    return load(settings, original, resolution, accelerator)


def _load_labelled(settings: RunSettings, original: Original, resolution: int, accelerator: Accelerator) -> RunData:
    data, classes, channels = settings.data, original.classes, original.channels
    if data.train_data_dir is not None:
        images = image_folder(data.train_data_dir)
        images = replace(images, labels=None) if classes is None else images
    else:
        split = load_dataset_split(source_of(data), data.dataset_config_name, data.dataset_split, _cache(settings))
        images = dataset_images(split, data.image_column, None if classes is None else settings.classes.label_column)
    if classes is not None:
        check_labels(images, classes)
        if images.classes:
            first = [f"{label} = {name}" for label, name in list(images.classes.items())[:NAMED]]
            accelerator.print("Classes: " + ", ".join([*first, *(["…"] if len(images.classes) > NAMED else [])]))
    training, validation = _check_and_split(images, settings, accelerator)
    train_data = ImageData(images, resolution, channels, random_flip=data.random_flip, indices=training)
    return RunData(train_data, ImageData(images, resolution, channels, indices=validation) if validation else None)


def _load_captioned(settings: RunSettings, original: Original, resolution: int, accelerator: Accelerator) -> RunData:
    data, captions = settings.data, settings.captions
    if data.train_data_dir is not None and not Path(data.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {data.train_data_dir} is not a folder")
    if captions.cache_dir_latents and not captions.center_crop:
        raise ValueError("--cache_dir_latents needs --center_crop: random crops differ every time")
    if captions.cache_dir_latents and captions.streaming:
        raise ValueError("--cache_dir_latents and --streaming exclude each other: a stream has no end to wait for")
    which = data.dataset_config_name, data.dataset_split, _cache(settings), captions.dataset_data_files
    dataset = load_dataset_split(source_of(data), *which, streaming=captions.streaming)
    views: dict[str, Any] = {
        "center_crop": captions.center_crop,
        "random_flip": data.random_flip,
        "empty_captions": captions.proportion_empty_prompts,
    }
    if captions.streaming:
        stream = TextToImageStream(
            dataset,
            data.image_column,
            captions.caption_column,
            settings.optimization.seed,
            settings.watching.validation_samples if data.validation_fraction else 0,
            captions.shuffle_buffer_size,
            resolution,
            captions.max_unreadable_fraction,
            **views,
        )
        return RunData(stream, stream.held_out())
    texts = dataset_captions(dataset, captions.caption_column)
    images = dataset_images(dataset, data.image_column)
    training, validation = _check_and_split(images, settings, accelerator)
    train_data = TextToImageData(images, texts, resolution, indices=training, **views)
    if not validation:
        return RunData(train_data, None)
    return RunData(train_data, TextToImageData(images, texts, resolution, center_crop=True, indices=validation))


def _check_and_split(images: Images, settings: RunSettings, accelerator: Accelerator) -> tuple[list[int], list[int]]:
    """Which images are trained on, and which are held out."""
    data = settings.data
    share = accelerator.process_index, accelerator.num_processes
    check_images(images, data.dataloader_num_workers, accelerator.is_local_main_process, *share, gather_object)
    accelerator.print(f"{len(images.names)} images of {source_of(data)}")
    assert data.validation_fraction is not None
    return order.hold_out(len(images.names), data.validation_fraction, settings.optimization.seed)


def source_of(data: Data) -> str:
    """Where the images come from, as the user said it."""
    return data.train_data_dir or data.dataset_name or ""


def trained_on(settings: RunSettings) -> str:
    """What a run was trained on, in words."""
    calls = settings.calls
    images = source_of(settings.data)
    recordings = f"recordings of {calls.calls_file or calls.recordings_dir}"
    return images if not calls.given else f"{recordings} and {images}" if images else recordings


def _cache(settings: RunSettings) -> str | None:
    return settings.model.cache_dir


def check_labels(images: Images, known: float) -> None:
    """Raises ValueError unless every image has a class that the model knows.

    Args:
        images: With or without labels.
        known: How many classes the model knows.
    """
    if images.labels is None:
        shortest = min(len(Path(name).parts) for name in images.names)
        outside = next(name for name in images.names if len(Path(name).parts) == shortest)
        raise ValueError(
            "the model is class-conditional, but the images have no labels: put each class in a subfolder, named by "
            f"its number; {outside} lies in none"
        )
    names = list((images.classes or {}).values())
    if not all(name.isdecimal() for name in names) and known != math.inf and len(names) != known:
        raise ValueError(
            f"the images have {len(names)} classes, {', '.join(names[:5])}, and the model {known:g}; name the folders "
            "by the model's class numbers, so that it is clear which is which"
        )
    outside_labels = [label for label in images.labels if not 0 <= label < known]
    if outside_labels:
        raise ValueError(f"label {outside_labels[0]} of the images is not one of the model's {known} classes")


def open_latent_cache(
    settings: RunSettings, original: Original, data: RunData, dtype: torch.dtype
) -> LatentCache | None:
    """The folder of `--cache_dir_latents`, if one is asked for: new, empty, or made from the same things.

    Raises:
        ValueError: If it holds something else.
    """
    folder, training = settings.captions.cache_dir_latents, data.training
    if folder is None or not isinstance(training, TextToImageData):
        return None
    description = {
        "model": original.name,
        "revision": settings.model.revision,
        "variant": settings.model.variant,
        "precision": dtype_name(dtype),
        "resolution": training.resolution,
        "random_flip": settings.data.random_flip,
        "data": source_of(settings.data),
        "images": len(training.images.names),
        "decoding": DECODING,
        "captions": hashlib.sha256(json.dumps(training.captions).encode()).hexdigest(),
    }
    return LatentCache(folder, description)


def encode_data(data: RunData, cache: LatentCache, encode: Encoder, accelerator: Accelerator, workers: int) -> RunData:
    """The same samples, encoded once; what is in the cache already stays as it is. All processes have to call it."""
    training, validation = data.training, data.validation
    assert isinstance(training, TextToImageData)
    every_image = TextToImageData(
        training.images, training.captions, training.resolution, center_crop=True, random_flip=training.random_flip
    )
    share = accelerator.process_index, accelerator.num_processes
    cache.write(every_image, encode, *share, workers, accelerator.is_local_main_process)
    accelerator.wait_for_everyone()
    held_out = LatentData(validation, cache) if isinstance(validation, TextToImageData) else None
    return RunData(LatentData(training, cache), held_out)

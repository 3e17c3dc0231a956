"""Compresses a pixel diffusion model (an unconditional or class-conditional `UNet2DModel`) to several sizes at once.

    accelerate launch recipes/compress_ddpm.py --pretrained_model_name_or_path DIR --train_data_dir IMAGES \
        --sizes 0.4 0.6 0.8 1.0 --output_dir OUT

makes a diffusers pipeline folder that holds all sizes in one set of weights; `OFAPipeline.from_pretrained("OUT")` loads
it, and its call takes `size=0.4`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from compression_run import (
    AddTo,
    MakeStudent,
    Setup,
    begin,
    cannot_load,
    check_not_compressed,
    check_pipeline_folder,
    check_sizes,
    compression_parser,
    count,
    finish,
    joint_run,
    make_noise_scheduler,
    make_supernet,
    run_recipe,
)
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import NAMED, Images, check_images, image_folder
from ofadiff.data.order import hold_out
from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.training.train import TrainingResult


def compress(args: argparse.Namespace) -> TrainingResult:
    """Makes `args.output_dir` from `args.pretrained_model_name_or_path`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    return train_and_save(args, set_up(args))


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before training. Raises ValueError if something the user gave cannot work."""
    # What can be wrong is found out first.
    accelerator = begin(args)
    check_not_compressed(args.pretrained_model_name_or_path)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, args.cache_dir)
    check_sizes(args, pipeline.unet)
    return build(args, accelerator, pipeline, make_supernet)


def build(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: DiffusionPipeline, make_student: MakeStudent
) -> Setup:
    """Data, teacher and student. Raises ValueError if something the user gave cannot work."""
    unet = pipeline.unet
    noise_scheduler = make_noise_scheduler(type(pipeline.scheduler).__name__, pipeline.scheduler.config)
    classes = None if unet.class_embedding is None else unet.config.num_class_embeds or math.inf
    shape = choose_resolution(args, unet), unet.config.in_channels
    train_data, validation_data = load_data(args, accelerator, *shape, classes)
    accelerator.wait_for_everyone()

    prepare = functools.partial(prepare_pixels, noise_scheduler=noise_scheduler)
    teacher = copy.deepcopy(unet)
    supernet, checkpoint = make_student(args, unet, train_data, prepare, accelerator)
    sample = functools.partial(sample_images, args, supernet.model, noise_scheduler)
    return Setup(accelerator, pipeline, prepare, train_data, validation_data, teacher, supernet, checkpoint, sample)


def train_and_save(args: argparse.Namespace, setup: Setup) -> TrainingResult:
    """Joint training, one subnet per step, and the pipeline folder that comes out of it."""
    result = joint_run(args, setup, columns=args.num_validation_images)

    # The original pipeline, with the supernet in place of its denoiser.
    if setup.accelerator.is_main_process:
        setup.supernet.save_pretrained(Path(args.output_dir) / "unet")
        setup.pipeline.scheduler.save_pretrained(Path(args.output_dir) / "scheduler")
        setup.pipeline.save_config(args.output_dir)
    return finish(args, setup, result)


def load_pipeline(name: str, cache_dir: str | None = None) -> DiffusionPipeline:
    """The pretrained pipeline: a scheduler around a `UNet2DModel` that works on pixels."""
    expected = "a DDPM-style pipeline folder: model_index.json beside unet/ (a UNet2DModel) and scheduler/"
    check_pipeline_folder(name, expected)
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, cache_dir=cache_dir)
    except (AttributeError, OSError, ValueError) as error:
        raise cannot_load(name, expected, error) from error
    if set(pipeline.components) != {"unet", "scheduler"}:
        parts = ", ".join(sorted(pipeline.components))
        raise ValueError(f"{name} is a {type(pipeline).__name__} made of {parts}; expected {expected}")
    if type(pipeline.unet) is not UNet2DModel:
        raise ValueError(f"the denoiser of {name} is a {type(pipeline.unet).__name__}; this recipe takes a UNet2DModel")
    config = pipeline.unet.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"the denoiser of {name} has {config.in_channels} input and {config.out_channels} output channels; "
            "learned variances are not supported"
        )
    return pipeline


def choose_resolution(args: argparse.Namespace, unet: UNet2DModel) -> int:
    """Side of the images: the one asked for, or the model's own."""
    resolution = args.resolution or unet.config.sample_size
    if not isinstance(resolution, int):
        raise ValueError(f"the model's sample size is {resolution}; give the side of square images with --resolution")
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution % factor:
        raise ValueError(f"--resolution {resolution} is not a multiple of {factor}, as this model needs")
    return resolution


def load_data(
    args: argparse.Namespace, accelerator: Accelerator, resolution: int, channels: int, classes: float | None
) -> tuple[ImageData, ImageData | None]:
    """Training and validation images, all of them checked.

    Args:
        args: Where they are.
        accelerator: Its processes share the check.
        resolution: Side of the square images.
        channels: 1, 3 or 4.
        classes: How many the model knows; None if it is unconditional.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give the images with one of --train_data_dir and --dataset_name")
    if args.train_data_dir is not None:
        images = image_folder(args.train_data_dir)
        images = replace(images, labels=None) if classes is None else images
    else:
        dataset = load_dataset_split(args.dataset_name, args.dataset_config_name, args.dataset_split, args.cache_dir)
        images = dataset_images(dataset, args.image_column, None if classes is None else args.label_column)
    if classes is not None:
        check_labels(images, classes)
        if images.classes:
            first = [f"{label} = {name}" for label, name in list(images.classes.items())[:NAMED]]
            accelerator.print("Classes: " + ", ".join([*first, *(["…"] if len(images.classes) > NAMED else [])]))
    share = accelerator.process_index, accelerator.num_processes
    check_images(images, args.dataloader_num_workers, accelerator.is_local_main_process, *share, gather_object)
    accelerator.print(f"{len(images.names)} images of {args.train_data_dir or args.dataset_name}")

    training, validation = hold_out(len(images.names), args.validation_fraction, args.seed)
    train_data = ImageData(images, resolution, channels, random_flip=args.random_flip, indices=training)
    return train_data, ImageData(images, resolution, channels, indices=validation) if validation else None


def check_labels(images: Images, known: float) -> None:
    """Raises ValueError unless every image has a class that the model knows."""
    if images.labels is None:
        outside = next((name for name in images.names if len(Path(name).parts) == min_depth(images)), images.names[0])
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


def min_depth(images: Images) -> int:
    """Parts of the shortest path of an image."""
    return min(len(Path(name).parts) for name in images.names)


def sample_images(
    args: argparse.Namespace, unet: UNet2DModel, noise_scheduler: DDPMScheduler, generators: list[torch.Generator]
) -> list[Image.Image]:
    """One image for each generator, at the supernet's size; of class-conditional models a class in turn."""
    scheduler = DDIMScheduler.from_config(noise_scheduler.config)
    if unet.class_embedding is None:
        pipeline, condition = DDPMPipeline(unet, scheduler), {"batch_size": len(generators)}
    else:
        classes = unet.config.num_class_embeds or len(generators)
        pipeline = ClassConditionalDDPMPipeline(unet, scheduler)
        condition = {"class_labels": [column % classes for column in range(len(generators))]}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=generators, num_inference_steps=args.ddpm_num_inference_steps, **condition).images


def make_parser() -> argparse.ArgumentParser:
    """The command line; names as in diffusers' training examples where these have one."""
    parser, add_to = compression_parser("Compress a pixel diffusion model to several sizes in one joint training run.")
    add_to["data"]("--train_data_dir", help="folder of images; for class-conditional models with a subfolder per class")
    add_to["data"]("--resolution", type=count(1), help="side of the images in pixels; the model's own by default")
    add_flags(add_to)
    parser.set_defaults(tracker_project_name="ofadiff-ddpm")
    return parser


def add_flags(add_to: AddTo) -> None:
    """What only pixel models have."""
    add_to["data"](
        "--label_column",
        default="label",
        help="column of integer classes in the data set, for class-conditional models",
    )
    add_to["watching"](
        "--num_validation_images", type=count(0), default=8, help="images drawn per size at each validation"
    )
    add_to["watching"]("--ddpm_num_inference_steps", type=count(1), default=50, help="denoising steps of these images")


if __name__ == "__main__":
    run_recipe(make_parser(), set_up, train_and_save)

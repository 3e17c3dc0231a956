"""Compresses a text-to-image pipeline, from Stable Diffusion to Flux, to several sizes at once.

    accelerate launch recipes/compress_sd.py --pretrained_model_name_or_path DIR --train_data_dir IMAGES \
        --sizes 0.4 0.6 0.8 1.0 --mixed_precision bf16 --output_dir OUT

makes a diffusers pipeline folder that holds all sizes of the UNet or transformer in one set of weights;
`OFAPipeline.from_pretrained` loads it, and its call takes `size=0.4`. Text encoders, VAE and scheduler stay what they
were.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from compression_run import (
    AT_LEAST_ZERO,
    POSITIVE,
    PRECISIONS,
    SHARE,
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
    save_around,
)
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from PIL import Image

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.captioned_stream import TextToImageStream
from ofadiff.data.captions import dataset_captions
from ofadiff.data.decoding import DECODING
from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.images import check_images
from ofadiff.data.latent_cache import LatentCache, LatentData
from ofadiff.data.order import hold_out
from ofadiff.denoisers.copies import copy_in
from ofadiff.denoisers.encoder import AUTOENCODERS, TextToImageEncoder, spatial_compression
from ofadiff.denoisers.families import FAMILIES
from ofadiff.denoisers.family import Family
from ofadiff.denoisers.prepare import prepare_latents
from ofadiff.noise.diffusion import diffuse
from ofadiff.noise.flow_matching import interpolate, is_flow_matching, static_shift
from ofadiff.noise.noisy_samples import ForwardProcess
from ofadiff.training.train import TrainingResult

EXPECTED = f"a pipeline folder of a {' or '.join(FAMILIES)}"


@dataclass(frozen=True)
class Plan:
    """What the original model's configuration says."""

    folder: Path
    family: Family
    forward_process: ForwardProcess
    denoiser: ModelMixin  # on the meta device


def compress(args: argparse.Namespace) -> TrainingResult:
    """Makes `args.output_dir` from `args.pretrained_model_name_or_path`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    return train_and_save(args, set_up(args))


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before training. Raises ValueError if something the user gave cannot work."""
    # What can be wrong is found out before any model is loaded.
    accelerator = begin(args)
    check_not_compressed(args.pretrained_model_name_or_path)
    plan = read_pipeline(args)
    check_sizes(args, plan.denoiser)
    return build(args, accelerator, plan, make_supernet)


def build(args: argparse.Namespace, accelerator: Accelerator, plan: Plan, make_student: MakeStudent) -> Setup:
    """Data, frozen parts and student. Raises ValueError if something the user gave cannot work."""
    train_data, validation_data = load_data(args, accelerator)
    precision = PRECISIONS[accelerator.mixed_precision]
    cache = make_latent_cache(args, train_data, precision)
    accelerator.wait_for_everyone()

    # The frozen parts; with cached latents the encoders leave the device once everything is encoded.
    pipeline = load_pipeline(args, plan)
    denoiser = pipeline.components[plan.family.denoiser]
    teacher, encode = freeze(pipeline, denoiser, precision)
    encode.to(accelerator.device)
    if cache is not None:
        every_image = TextToImageData(
            train_data.images, train_data.captions, args.resolution, center_crop=True, random_flip=args.random_flip
        )
        share = accelerator.process_index, accelerator.num_processes
        cache.write(every_image, encode, *share, args.dataloader_num_workers, accelerator.is_local_main_process)
        accelerator.wait_for_everyone()
        encode.to("cpu")
        train_data = LatentData(train_data, cache)
        validation_data = None if validation_data is None else LatentData(validation_data, cache)

    prepare = functools.partial(
        prepare_latents,
        family=plan.family,
        config=denoiser.config,
        forward_process=plan.forward_process,
        encode=encode if cache is None else None,
    )
    supernet, checkpoint = make_student(args, denoiser, train_data, prepare, accelerator)
    pipeline.register_modules(**{plan.family.denoiser: supernet.model})
    sample = functools.partial(sample_images, args, plan.family, encode, accelerator)
    return Setup(accelerator, pipeline, prepare, train_data, validation_data, teacher, supernet, checkpoint, sample)


def train_and_save(args: argparse.Namespace, setup: Setup) -> TrainingResult:
    """Joint training, one subnet per step, and the pipeline folder that comes out of it."""
    result = joint_run(args, setup, columns=len(args.validation_prompts or []))

    if setup.accelerator.is_main_process:
        denoiser = FAMILIES[type(setup.pipeline).__name__].denoiser
        folder = Path(setup.pipeline.name_or_path)
        save_around(denoiser, setup.supernet.model, folder, Path(args.output_dir), args.variant)
    return finish(args, setup, result)


def read_pipeline(args: argparse.Namespace) -> Plan:
    """Checks the original pipeline by its configuration files."""
    name = args.pretrained_model_name_or_path
    check_pipeline_folder(name, EXPECTED)
    try:
        index = DiffusionPipeline.load_config(name, revision=args.revision, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise cannot_load(name, EXPECTED, error) from error
    family = FAMILIES.get(index["_class_name"])
    if family is None:
        raise ValueError(f"{name} is a {index['_class_name']}; expected {EXPECTED}")
    try:
        folder = pipeline_folder(args)
        scheduler = DDPMScheduler.load_config(folder, subfolder="scheduler")
        denoiser = empty_model(family.denoiser_class, folder / family.denoiser)
        vae = empty_model(autoencoder_class(folder / "vae"), folder / "vae")
    except (OSError, ValueError) as error:
        raise cannot_load(name, EXPECTED, error) from error

    config = denoiser.config
    given, latent = config.in_channels, vae.config.latent_channels
    put_out = config.out_channels or given
    expected = latent * family.packing**2
    # A learned variance has as many channels as the prediction.
    if given != expected or put_out not in (given, 2 * given):
        raise ValueError(
            f"the {family.denoiser} of {name} has {given} input and {put_out} output channels, its VAE {latent}; "
            f"text-to-image models have {expected} channels of both then, or twice as many of output"
        )
    multiple = spatial_compression(vae) * family.packing * config.get("patch_size", 1)
    if args.resolution % multiple:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of {multiple}, as this model needs")
    largest = config.get("pos_embed_max_size") or args.resolution
    if args.resolution > largest * multiple:
        raise ValueError(f"--resolution {args.resolution} is more than {largest * multiple}, this model's largest")
    return Plan(folder, family, make_forward_process(args, scheduler["_class_name"], scheduler), denoiser)


def empty_model(model_class: type[ModelMixin], folder: Path) -> ModelMixin:
    """A model without its weights."""
    with torch.device("meta"):
        return model_class.from_config(model_class.load_config(folder))


def autoencoder_class(folder: Path) -> type[ModelMixin]:
    """Raises ValueError unless it is one that images can be encoded with."""
    name = AutoencoderKL.load_config(folder)["_class_name"]
    known = {autoencoder.__name__: autoencoder for autoencoder in AUTOENCODERS}
    if name not in known:
        raise ValueError(f"its VAE is an {name}, not an {' or '.join(known)}")
    return known[name]


def make_forward_process(args: argparse.Namespace, name: str, config: dict[str, Any]) -> ForwardProcess:
    """How training makes latents noisy, from the configuration of the pipeline's scheduler, called `name`."""
    if not is_flow_matching(name, config):
        options = {"snr_gamma": args.snr_gamma, "noise_offset": args.noise_offset}
        return functools.partial(diffuse, noise_scheduler=make_noise_scheduler(name, config), **options)
    for flag in ("snr_gamma", "noise_offset"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is for DDPM-style schedulers; this model's {name} is one of flow matching")
    timesteps = config.get("num_train_timesteps", 1000)
    return functools.partial(interpolate, shift=static_shift(config), num_train_timesteps=timesteps)


def pipeline_folder(args: argparse.Namespace) -> Path:
    """The original pipeline's folder; a hub name is downloaded first."""
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    where = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    return Path(DiffusionPipeline.download(name, **where))


def load_pipeline(args: argparse.Namespace, plan: Plan) -> DiffusionPipeline:
    """The original pipeline in full precision, without its safety checker."""
    without = absent_components(plan.folder)
    if plan.family.pipeline_class is StableDiffusionPipeline:
        without |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = plan.family.pipeline_class.from_pretrained(plan.folder, variant=args.variant, **without)
    except (AttributeError, OSError, ValueError) as error:
        raise cannot_load(args.pretrained_model_name_or_path, EXPECTED, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def absent_components(folder: str | Path) -> dict[str, None]:
    """What a pipeline was saved without, such as the T5 of Stable Diffusion 3; diffusers wants to be told so."""
    return {name: None for name, value in DiffusionPipeline.load_config(folder).items() if value == [None, None]}


def freeze(
    pipeline: DiffusionPipeline, denoiser: ModelMixin, precision: torch.dtype
) -> tuple[ModelMixin, TextToImageEncoder]:
    """The teacher, and the VAE with the text encoders, in a precision; what float16 is too small for in float32."""
    teacher, encode = copy_in(denoiser, precision), TextToImageEncoder(pipeline)
    for module in encode.modules:  # whatever dtype each was stored in
        upcast = module is pipeline.vae and precision == torch.float16 and module.config.get("force_upcast")
        # Not the method of diffusers models, which warns about every cast.
        torch.nn.Module.to(module, torch.float32 if upcast else precision)
    return teacher.requires_grad_(False), encode


def load_data(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[TextToImageData | TextToImageStream, TextToImageData | None]:
    """Training and validation images with their captions, all of them checked, but of a stream."""
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give the images with one of --train_data_dir and --dataset_name")
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir} is not a folder")
    if args.cache_dir_latents and not args.center_crop:
        raise ValueError("--cache_dir_latents needs --center_crop: random crops differ every time")
    if args.cache_dir_latents and args.streaming:
        raise ValueError("--cache_dir_latents and --streaming exclude each other: a stream has no end to wait for")
    source = args.train_data_dir or args.dataset_name
    which = args.dataset_config_name, args.dataset_split, args.cache_dir, args.dataset_data_files
    dataset = load_dataset_split(source, *which, streaming=args.streaming)
    if args.streaming:
        train_stream = TextToImageStream(
            dataset,
            args.image_column,
            args.caption_column,
            args.seed,
            args.validation_samples if args.validation_fraction else 0,
            args.shuffle_buffer_size,
            args.resolution,
            args.max_unreadable_fraction,
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            empty_captions=args.proportion_empty_prompts,
        )
        return train_stream, train_stream.held_out()
    captions = dataset_captions(dataset, args.caption_column)
    images = dataset_images(dataset, args.image_column)
    share = accelerator.process_index, accelerator.num_processes
    check_images(images, args.dataloader_num_workers, accelerator.is_local_main_process, *share, gather_object)
    accelerator.print(f"{len(images.names)} images of {source}")

    training, validation = hold_out(len(images.names), args.validation_fraction, args.seed)
    train_data = TextToImageData(
        images,
        captions,
        args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        empty_captions=args.proportion_empty_prompts,
        indices=training,
    )
    if not validation:
        return train_data, None
    return train_data, TextToImageData(images, captions, args.resolution, center_crop=True, indices=validation)


def make_latent_cache(args: argparse.Namespace, data: TextToImageData, dtype: torch.dtype) -> LatentCache | None:
    """The folder of `--cache_dir_latents`, if one is asked for: new, empty, or made from the same things."""
    if args.cache_dir_latents is None:
        return None
    description = {
        "model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "variant": args.variant,
        "precision": str(dtype).removeprefix("torch."),
        "resolution": args.resolution,
        "random_flip": args.random_flip,
        "data": args.train_data_dir or args.dataset_name,
        "images": len(data.images.names),
        "decoding": DECODING,
        "captions": hashlib.sha256(json.dumps(data.captions).encode()).hexdigest(),
    }
    return LatentCache(args.cache_dir_latents, description)


def sample_images(
    args: argparse.Namespace,
    family: Family,
    encode: TextToImageEncoder,
    accelerator: Accelerator,
    generators: list[torch.Generator],
) -> list[Image.Image]:
    """One image for each validation prompt, at the supernet's size."""
    encode.to(accelerator.device)
    options = {"num_inference_steps": args.validation_inference_steps, **family.call_options}
    options |= {"height": args.resolution, "width": args.resolution}
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    images = [
        encode.pipeline(prompt, generator=generator, **options).images[0]
        for prompt, generator in zip(args.validation_prompts, generators, strict=True)
    ]
    if args.cache_dir_latents:
        encode.to("cpu")
    return images


def make_parser() -> argparse.ArgumentParser:
    """The command line; names as in diffusers' training examples where these have one."""
    parser, add_to = compression_parser("Compress a text-to-image pipeline to several sizes in one joint training run.")
    add = add_to["data"]
    add(
        "--train_data_dir",
        help="folder of images with a metadata.jsonl (file_name, text), of parquet files, or of .tar shards",
    )
    add("--resolution", type=count(1), default=512, help="side of the images in pixels")
    add_flags(add_to)
    parser.set_defaults(
        tracker_project_name="ofadiff-sd",
        validation_fraction=0.02,
        max_train_steps=50_000,
        learning_rate=5e-5,
        lr_warmup_steps=500,
    )
    return parser


def add_flags(add_to: AddTo) -> None:
    """What only text-to-image models have."""
    add = add_to["data"]
    add(
        "--dataset_data_files",
        nargs="+",
        help="files of the data set: paths, addresses, patterns, numbered ones such as shards/{000..099}.tar with "
        "--dataset_name webdataset",
    )
    add("--caption_column", default="text", help="column of captions: strings, or lists to pick one from; or json.text")
    add(
        "--streaming",
        action="store_true",
        help="read the data set while training; its first --validation_samples images are held out, unless "
        "--validation_fraction is 0",
    )
    add("--shuffle_buffer_size", type=count(1), default=1000, help="images of a stream that are shuffled, in memory")
    add(
        "--max_unreadable_fraction",
        type=SHARE,
        default=0.1,
        help="share of a stream's samples that may be unreadable; with more the run stops",
    )
    add("--revision", help="of the original model on the hub")
    add("--variant", help="of the original model's weight files, such as fp16")
    add("--center_crop", action="store_true", help="crop the middle of each image; by default a random square")
    add("--cache_dir_latents", help="encode images and captions once and keep them in this folder")
    add = add_to["training"]
    add("--proportion_empty_prompts", type=float, default=0.1, help="share of captions left out, for guidance")
    add("--snr_gamma", type=POSITIVE, help="min-SNR weighting of timesteps with this gamma, such as 5; none by default")
    add(
        "--noise_offset",
        type=AT_LEAST_ZERO,
        default=0.0,
        help="size of a random shift of each channel's noise, such as 0.05",
    )
    add = add_to["watching"]
    add("--validation_prompts", nargs="+", help="prompts drawn at every size at each validation; none by default")
    add("--validation_inference_steps", type=count(1), default=25, help="denoising steps of these images")
    add("--guidance_scale", type=AT_LEAST_ZERO, help="of these images; the pipeline's own by default")


if __name__ == "__main__":
    run_recipe(make_parser(), set_up, train_and_save)

"""Compresses a class-conditional diffusion transformer (a `DiTTransformer2DModel`) to several sizes at once.

    accelerate launch recipes/compress_dit.py --pretrained_model_name_or_path DIR --train_data_dir IMAGES \
        --sizes 0.5 0.75 1.0 --mixed_precision bf16 --output_dir OUT

makes a diffusers pipeline folder that holds all sizes of the transformer in one set of weights;
`OFAPipeline.from_pretrained("OUT")` loads it, and its call takes `size=0.5`. The original is a `DiTPipeline`, which
works on latents, or a `DDPMPipeline` whose denoiser is a DiT that works on pixels.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from compress_ddpm import load_data
from compression_run import (
    AT_LEAST_ZERO,
    PRECISIONS,
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
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
)
from PIL import Image

from ofadiff.denoisers.class_labels import keep_labels, prepare_class_labels
from ofadiff.denoisers.copies import copy_in
from ofadiff.denoisers.encoder import encode_images
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.training.sharding import is_sharded
from ofadiff.training.train import TrainingResult

# Where each pipeline class keeps its denoiser.
DENOISERS = {DiTPipeline: "transformer", DDPMPipeline: "unet", DDIMPipeline: "unet"}
EXPECTED = "a DiTPipeline, or a DDPMPipeline of a DiTTransformer2DModel"


@dataclass(frozen=True)
class Plan:
    """What the original model is made of."""

    pipeline: DiffusionPipeline
    denoiser: str
    noise_scheduler: DDPMScheduler

    @property
    def transformer(self) -> DiTTransformer2DModel:
        """The denoiser."""
        return self.pipeline.components[self.denoiser]

    @property
    def vae(self) -> AutoencoderKL | None:
        """None for a model of pixels."""
        return self.pipeline.components.get("vae")


def compress(args: argparse.Namespace) -> TrainingResult:
    """Makes `args.output_dir` from `args.pretrained_model_name_or_path`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    return train_and_save(args, set_up(args))


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before training. Raises ValueError if something the user gave cannot work."""
    # What can be wrong is found out first.
    if not 0 <= args.class_dropout_prob <= 1:
        raise ValueError(f"--class_dropout_prob is {args.class_dropout_prob}; it must lie in [0, 1]")
    accelerator = begin(args)
    if is_sharded(accelerator):
        raise ValueError(
            "FSDP does not work with diffusers' DiT, which uses a weight of its first block outside that block: choose "
            "plain multi-GPU in `accelerate config`"
        )
    check_not_compressed(args.pretrained_model_name_or_path)
    plan = load_pipeline(args)
    transformer, vae = plan.transformer, plan.vae
    check_sizes(args, transformer)
    config = transformer.config
    shape = config.sample_size, config.in_channels
    if vae is not None:
        shape = config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1), vae.config.in_channels
    train_data, validation_data = load_data(args, accelerator, *shape, config.num_embeds_ada_norm)
    accelerator.wait_for_everyone()

    # The frozen parts.
    precision = PRECISIONS[accelerator.mixed_precision]
    teacher = copy_in(transformer, precision).requires_grad_(False)
    encode = None
    if vae is not None:
        half = torch.float32 if precision == torch.float16 and vae.config.force_upcast else precision
        frozen = copy_in(vae, half).to(accelerator.device).requires_grad_(False).eval()
        encode = functools.partial(encode_images, frozen)

    # The supernet: rotate, rank, give every size its widths.
    prepare = functools.partial(
        prepare_class_labels,
        noise_scheduler=plan.noise_scheduler,
        null_class=config.num_embeds_ada_norm,
        class_dropout_prob=args.class_dropout_prob,
        encode=encode,
    )
    supernet, checkpoint = make_supernet(args, transformer, train_data, prepare, accelerator)
    keep_labels(supernet.model)
    plan.pipeline.register_modules(**{plan.denoiser: supernet.model})
    sample = functools.partial(sample_images, args, plan, accelerator)
    return Setup(
        accelerator, plan.pipeline, prepare, train_data, validation_data, teacher, supernet, checkpoint, sample
    )


def train_and_save(args: argparse.Namespace, setup: Setup) -> TrainingResult:
    """Joint training, one subnet per step, and the pipeline folder that comes out of it."""
    result = joint_run(args, setup, columns=args.num_validation_images)

    # The original pipeline, with the supernet in place of its denoiser.
    if setup.accelerator.is_main_process:
        folder = pipeline_folder(args)
        save_around(DENOISERS[type(setup.pipeline)], setup.supernet.model, folder, Path(args.output_dir), args.variant)
    return finish(args, setup, result)


def pipeline_folder(args: argparse.Namespace) -> Path:
    """The original pipeline's folder; a hub name is in the cache."""
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    return Path(DiffusionPipeline.download(name, variant=args.variant, cache_dir=args.cache_dir))


def load_pipeline(args: argparse.Namespace) -> Plan:
    """The original pipeline, in full precision."""
    name = args.pretrained_model_name_or_path
    check_pipeline_folder(name, EXPECTED)
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, variant=args.variant, cache_dir=args.cache_dir)
    except (AttributeError, OSError, ValueError) as error:
        raise cannot_load(name, EXPECTED, error) from error
    denoiser = pipeline.components.get(DENOISERS.get(type(pipeline), ""))
    if type(denoiser) is not DiTTransformer2DModel:
        found = (
            type(pipeline).__name__ if denoiser is None else f"{type(pipeline).__name__} of a {type(denoiser).__name__}"
        )
        raise ValueError(f"{name} is a {found}; expected {EXPECTED}")
    scheduler = make_noise_scheduler(type(pipeline.scheduler).__name__, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return Plan(pipeline, DENOISERS[type(pipeline)], scheduler)


def sample_images(
    args: argparse.Namespace, plan: Plan, accelerator: Accelerator, generators: list[torch.Generator]
) -> list[Image.Image]:
    """One image for each generator, of a class in turn, at the supernet's size."""
    scheduler = DDIMScheduler.from_config(plan.noise_scheduler.config)
    classes = plan.transformer.config.num_embeds_ada_norm
    options = {
        "class_labels": [column % classes for column in range(len(generators))],
        "generator": generators,
        "num_inference_steps": args.validation_inference_steps,
    }
    if plan.vae is None:
        pipeline = ClassConditionalDDPMPipeline(plan.transformer, scheduler)
    else:
        pipeline = DiTPipeline(plan.transformer, plan.vae.to(accelerator.device), scheduler)
        options["guidance_scale"] = args.guidance_scale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**options).images


def make_parser() -> argparse.ArgumentParser:
    """The command line; names as in diffusers' training examples where these have one."""
    parser, add_to = compression_parser(
        "Compress a class-conditional transformer to several sizes in one joint training run."
    )
    add = add_to["data"]
    add("--train_data_dir", help="folder of images with a subfolder per class")
    add("--label_column", default="label", help="column of integer classes in the data set")
    add("--variant", help="of the original model's weight files, such as fp16")
    add("--class_dropout_prob", type=float, default=0.1, help="share of labels left out, for guidance")
    add = add_to["watching"]
    add("--num_validation_images", type=count(0), default=8, help="images drawn per size at each validation")
    add("--validation_inference_steps", type=count(1), default=50, help="denoising steps of these images")
    add(
        "--guidance_scale",
        type=AT_LEAST_ZERO,
        default=1.0,
        help="of these images; DiTPipeline guides models of 1000 classes only",
    )
    parser.set_defaults(tracker_project_name="ofadiff-dit")
    return parser


if __name__ == "__main__":
    run_recipe(make_parser(), set_up, train_and_save)

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
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import send_to_device
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid

from ofadiff import Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.allocation import BUDGETS
from ofadiff.channels import ChannelGroup
from ofadiff.importance import CRITERIA
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.reweight import STRATEGIES
from ofadiff.training.checkpoint import DENOISER, check_same_run, find_checkpoint, list_checkpoints
from ofadiff.training.data import (
    ImageData,
    Images,
    check_images,
    dataset_images,
    fixed_batches,
    hold_out,
    image_folder,
    load_dataset_split,
)
from ofadiff.training.losses import TARGETS, Prepare, denoising_loss, prepare_pixels
from ofadiff.training.train import TrainingResult, run_values, train


@dataclass(frozen=True)
class Setup:
    """What training needs, built and checked."""

    accelerator: Accelerator
    pipeline: DiffusionPipeline
    noise_scheduler: DDPMScheduler
    prepare: Prepare
    train_data: ImageData
    validation_data: ImageData | None
    teacher: UNet2DModel
    supernet: Supernet
    checkpoint: Path | None


def compress(args: argparse.Namespace) -> TrainingResult:
    """Makes `args.output_dir` from `args.pretrained_model_name_or_path`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    return train_and_save(args, set_up(args))


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before training. Raises ValueError if something the user gave cannot work."""
    # What can be wrong is found out first.
    check_output_dir(args)
    accelerator = make_accelerator(args)
    pipeline = load_pipeline(args.pretrained_model_name_or_path)
    unet, noise_scheduler = pipeline.unet, make_noise_scheduler(pipeline)
    groups = find_channel_groups(unet)
    alike = {group.name: torch.ones(group.width) for group in groups}
    allocate(unet, groups, alike, args.sizes, args.budget, args.min_keep)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    train_data, validation_data = load_data(args, unet, accelerator)
    accelerator.wait_for_everyone()

    # The supernet: rotate, rank, give every size its widths.
    prepare = functools.partial(prepare_pixels, noise_scheduler=noise_scheduler)
    teacher = copy.deepcopy(unet)
    if checkpoint is not None:
        check_same_run(checkpoint, run_values(accelerator, train_data, args.train_batch_size, args.seed, args.reweight))
        supernet = Supernet.from_pretrained(checkpoint / DENOISER)
        check_same_sizes(args, supernet, checkpoint)
        accelerator.print(f"Resuming from {checkpoint}")
    else:
        if args.rotate:
            rotate_attention(unet, groups)
        scores = score(args, unet, groups, train_data, prepare, accelerator)
        subnets = allocate(unet, groups, scores, args.sizes, args.budget, args.min_keep)
        supernet = Supernet(unet, groups, scores, subnets, provenance=provenance(args))
    accelerator.print(size_table(supernet))
    return Setup(
        accelerator, pipeline, noise_scheduler, prepare, train_data, validation_data, teacher, supernet, checkpoint
    )


def train_and_save(args: argparse.Namespace, setup: Setup) -> TrainingResult:
    """Joint training, one subnet per step, and the pipeline folder that comes out of it."""
    accelerator, supernet = setup.accelerator, setup.supernet
    if args.gradient_checkpointing:
        supernet.model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        supernet.model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    if accelerator.is_main_process and args.overwrite_output_dir:
        for old in list_checkpoints(args.output_dir):
            shutil.rmtree(old)
    accelerator.init_trackers(args.tracker_project_name, config=flat(vars(args)))
    result = train(
        supernet,
        setup.train_data,
        setup.validation_data,
        setup.prepare,
        optimizer,
        lr_scheduler,
        accelerator,
        args.output_dir,
        max_train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size,
        seed=args.seed,
        strategy=args.reweight,
        teacher=setup.teacher if args.distill_weight or args.feature_distill_weight else None,
        distill_weight=args.distill_weight,
        feature_distill_weight=args.feature_distill_weight,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
        validation_steps=args.validation_steps,
        validation_samples=args.validation_samples,
        on_validation=functools.partial(draw_samples, args, supernet, setup.noise_scheduler),
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from=setup.checkpoint,
        num_workers=args.dataloader_num_workers,
    )

    # The original pipeline, with the supernet in place of its denoiser.
    if accelerator.is_main_process:
        supernet.save_pretrained(Path(args.output_dir) / "unet")
        setup.pipeline.scheduler.save_pretrained(Path(args.output_dir) / "scheduler")
        setup.pipeline.save_config(args.output_dir)
    accelerator.print(loss_table(result))
    accelerator.print(f"{args.output_dir} holds {len(supernet.sizes)} sizes: OFAPipeline.from_pretrained loads it")
    accelerator.end_training()
    return result


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises ValueError unless the output folder is new or empty, or may be resumed or overwritten."""
    folder = Path(args.output_dir)
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    if folder.resolve() == Path(args.pretrained_model_name_or_path).resolve():
        raise ValueError(f"--output_dir {folder} is the pretrained model's own folder")
    if args.overwrite_output_dir or not folder.exists():
        return
    if args.resume_from_checkpoint and list_checkpoints(folder):
        return
    # A run that was killed before its first checkpoint leaves these behind.
    own = {args.logging_dir, "samples"} if args.resume_from_checkpoint else set()
    if any(path.name not in own and not path.name.startswith(".checkpoint-") for path in folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} is not empty; choose another one, continue a run with --resume_from_checkpoint "
            "latest, or replace its files with --overwrite_output_dir"
        )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers as asked for."""
    tracker = None if args.report_to == "none" else args.report_to
    available = [str(known.value) for known in get_available_trackers()]
    if tracker is not None and tracker not in available:
        installed = ", ".join(available) or "no tracker"
        raise ValueError(f"--report_to {args.report_to}: not installed or unknown; installed: {installed}")
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker,
        project_dir=Path(args.output_dir) / args.logging_dir,
    )


def load_pipeline(name: str) -> DiffusionPipeline:
    """The pretrained pipeline: a scheduler around a `UNet2DModel` that works on pixels."""
    expected = "a DDPM-style pipeline folder: model_index.json beside unet/ (a UNet2DModel) and scheduler/"
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        config = Path(name) / "config.json"
        alone = json.loads(config.read_text()).get("_class_name") if config.is_file() else None
        found = f"it is the folder of a single {alone}" if alone else "it has no model_index.json"
        raise ValueError(f"{name} is not {expected}; {found}")
    if (Path(name) / "unet" / "ofa_config.json").is_file():
        raise ValueError(f"{name} is compressed already; expected the original model")
    try:
        pipeline = DiffusionPipeline.from_pretrained(name)
    except (AttributeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) if Path(name).is_dir() else "no such folder, and the hub gave none"
        raise ValueError(f"cannot load {name}, expected {expected}; {reason}") from error
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


def make_noise_scheduler(pipeline: DiffusionPipeline) -> DDPMScheduler:
    """The forward process of the pipeline's scheduler."""
    config = pipeline.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type") not in TARGETS:
        raise ValueError(
            f"the scheduler is a {type(pipeline.scheduler).__name__} with prediction type "
            f"{config.get('prediction_type')!r}; expected a DDPM-style one with {', '.join(TARGETS)}"
        )
    return DDPMScheduler.from_config(config)


def load_data(
    args: argparse.Namespace, unet: UNet2DModel, accelerator: Accelerator
) -> tuple[ImageData, ImageData | None]:
    """Training and validation images, all of them checked."""
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give the images with one of --train_data_dir and --dataset_name")
    resolution = args.resolution or unet.config.sample_size
    if not isinstance(resolution, int):
        raise ValueError(f"the model's sample size is {resolution}; give the side of square images with --resolution")
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution % factor:
        raise ValueError(f"--resolution {resolution} is not a multiple of {factor}, as this model needs")

    conditional = unet.class_embedding is not None
    if args.train_data_dir is not None:
        images = image_folder(args.train_data_dir)
        images = images if conditional else replace(images, labels=None)
    else:
        dataset = load_dataset_split(args.dataset_name, args.dataset_config_name, args.dataset_split, args.cache_dir)
        images = dataset_images(dataset, args.image_column, args.label_column if conditional else None)
    if conditional:
        check_labels(images, unet)
    check_images(images, args.dataloader_num_workers, accelerator.is_local_main_process)

    training, validation = hold_out(len(images.names), args.validation_fraction, args.seed)
    size_and_mode = resolution, unet.config.in_channels
    train_data = ImageData(images, *size_and_mode, random_flip=args.random_flip, indices=training)
    return train_data, ImageData(images, *size_and_mode, indices=validation) if validation else None


def check_labels(images: Images, unet: UNet2DModel) -> None:
    """Raises ValueError unless every image has a class that the model knows."""
    if images.labels is None:
        raise ValueError("the model is class-conditional, but the images have no labels: put each class in a subfolder")
    known = unet.config.num_class_embeds or math.inf
    outside = [label for label in images.labels if not 0 <= label < known]
    if outside:
        raise ValueError(f"label {outside[0]} of the images is not one of the model's {known} classes")


def check_same_sizes(args: argparse.Namespace, supernet: Supernet, checkpoint: Path) -> None:
    """Raises ValueError unless the checkpoint has the sizes that were asked for."""
    subnets = supernet.subnets
    saved = {"sizes": list(supernet.sizes), "budget": subnets.budget, "min_keep": subnets.min_keep}
    asked = {"sizes": sorted(args.sizes), "budget": args.budget, "min_keep": args.min_keep}
    for name in saved:
        if saved[name] != asked[name]:
            raise ValueError(f"cannot resume from {checkpoint}: its --{name} is {saved[name]}, not {asked[name]}")


def score(
    args: argparse.Namespace,
    unet: UNet2DModel,
    groups: Sequence[ChannelGroup],
    train_data: ImageData,
    prepare: Prepare,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Importance of every unit: each process takes its share of the samples, and all get the mean."""
    unet.to(accelerator.device)
    share = accelerator.process_index, accelerator.num_processes
    batches = fixed_batches(train_data, args.importance_samples, args.train_batch_size, args.seed, "importance", *share)
    scores = score_channels(
        unet,
        groups,
        (send_to_device(batch, accelerator.device) for batch in batches),
        functools.partial(denoising_loss, prepare=prepare),
        args.criterion,
    )
    means = accelerator.reduce(send_to_device(scores, accelerator.device), "mean")
    return {name: mean.cpu() for name, mean in means.items()}


def provenance(args: argparse.Namespace) -> dict[str, object]:
    """What the checkpoint remembers of how it was made."""
    keys = ("criterion", "importance_samples", "rotate", "reweight", "max_train_steps", "seed")
    return {"teacher": args.pretrained_model_name_or_path, **{key: getattr(args, key) for key in keys}}


@torch.no_grad()
def draw_samples(args: argparse.Namespace, supernet: Supernet, noise_scheduler: DDPMScheduler, step: int) -> None:
    """Writes `samples/{step}.png`: a row per size, a column per seed."""
    if not args.num_validation_images:
        return
    count, unet = args.num_validation_images, supernet.model
    scheduler = DDIMScheduler.from_config(noise_scheduler.config)
    if unet.class_embedding is None:
        pipeline, condition = DDPMPipeline(unet, scheduler), {"batch_size": count}
    else:
        labels = [column % (unet.config.num_class_embeds or count) for column in range(count)]
        pipeline, condition = ClassConditionalDDPMPipeline(unet, scheduler), {"class_labels": labels}
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for size in supernet.sizes:
        generator = [torch.Generator().manual_seed(args.seed + column) for column in range(count)]
        with supernet.at(size):
            images += pipeline(
                generator=generator, num_inference_steps=args.ddpm_num_inference_steps, **condition
            ).images
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(supernet.sizes), cols=count).save(folder / f"{step:06}.png")


def size_table(supernet: Supernet) -> str:
    """The sizes, as asked for and as reached."""
    full = supernet.subnets
    rows = [f"{'size':>6}  {'parameters':>20}  {'MACs':>20}"]
    for subnet in full:
        params = f"{readable(subnet.params)} ({subnet.params / full.full_params:.1%})"
        macs = f"{readable(subnet.macs)} ({subnet.macs / full.full_macs:.1%})"
        rows.append(f"{subnet.size:>6g}  {params:>20}  {macs:>20}")
    return "\n".join(rows)


def readable(number: int) -> str:
    """A count in millions or billions."""
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} G"


def loss_table(result: TrainingResult) -> str:
    """The validation losses before and after training."""
    if not result.history:
        return "No validation images (--validation_fraction 0), so no validation losses"
    first, last = result.history[min(result.history)], result.history[max(result.history)]
    rows = [f"{'size':>7}  {'before':>8}  {'after':>8}   validation loss, {result.steps} steps"]
    rows += [f"{size:>7g}  {first[size]:>8.4f}  {last[size]:>8.4f}" for size in last]
    if result.teacher_loss is not None:
        rows.append(f"teacher  {result.teacher_loss:>8.4f}")
    return "\n".join(rows)


def flat(values: dict[str, object]) -> dict[str, object]:
    """Arguments as trackers take them: numbers and strings."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}


def count(minimum: int) -> functools.partial:
    """An argument type: a whole number of at least `minimum`."""
    return functools.partial(_count, minimum=minimum)


def _count(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return int(text)


def size(text: str) -> float:
    """An argument type: a fraction in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; sizes are fractions in (0, 1], such as 0.5")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line; names as in diffusers' training examples where these have one."""
    parser = argparse.ArgumentParser(
        description="Compress a pixel diffusion model to several sizes in one joint training run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline folder of the original model")
    add("--train_data_dir", help="folder of images; for class-conditional models with a subfolder per class")
    add("--dataset_name", help="instead: a `datasets` data set, by hub name or a folder made by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", default="train", help="split of the data set")
    add("--image_column", default="image", help="its column of images")
    add("--label_column", default="label", help="its column of integer classes, for class-conditional models")
    add("--cache_dir", help="where a hub data set is kept")
    add("--resolution", type=count(1), help="side of the images in pixels; the model's own by default")
    add("--random_flip", action="store_true", help="mirror half of the training images")
    add("--validation_fraction", type=float, default=0.1, help="share of the images held out for validation")
    add("--dataloader_num_workers", type=count(0), default=0, help="processes that load images")
    add("--output_dir", required=True, help="pipeline folder to make; must be new or empty")
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="replace the pipeline and the checkpoints of an earlier run in the output folder",
    )

    add = parser.add_argument_group("compression").add_argument
    add("--sizes", type=size, nargs="+", default=[0.4, 0.6, 0.8, 1.0], help="fractions of the full model")
    add("--budget", choices=BUDGETS, default="params", help="what a size is a fraction of")
    add("--min_keep", type=float, default=0.25, help="smallest share of its channels that a layer keeps")
    add("--criterion", choices=sorted(CRITERIA), default="taylor", help="how channels are ranked")
    add("--importance_samples", type=count(1), default=1024, help="noisy images that the ranking looks at")
    add(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="turn attention heads into the basis of their singular vectors before ranking",
    )

    add = parser.add_argument_group("training").add_argument
    add("--reweight", choices=sorted(STRATEGIES), default="linear", help="how the size of each step is drawn")
    add("--distill_weight", type=float, default=1.0, help="weight of the distance to the teacher's prediction")
    add("--feature_distill_weight", type=float, default=0.0, help="weight of the distance to its block outputs")
    add("--max_train_steps", type=count(1), default=10_000, help="optimizer steps")
    add("--train_batch_size", type=count(1), default=16, help="images per device and forward")
    add("--gradient_accumulation_steps", type=count(1), default=1, help="forwards per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="save memory: compute activations twice")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="of forwards; accelerate's configuration by default")
    add("--learning_rate", type=float, default=1e-4, help="of AdamW, after warm-up")
    add("--lr_scheduler", choices=("cosine", "constant_with_warmup"), default="cosine", help="learning rate over time")
    add("--lr_warmup_steps", type=count(0), default=100, help="steps over which the learning rate rises")
    add("--adam_beta1", type=float, default=0.9, help="of AdamW")
    add("--adam_beta2", type=float, default=0.999, help="of AdamW")
    add("--adam_weight_decay", type=float, default=0.0, help="of AdamW; decays channels on steps that do not use them")
    add("--adam_epsilon", type=float, default=1e-8, help="of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--ema_decay", type=float, default=0.9999, help="largest decay of the average of the weights")
    add("--seed", type=int, default=0, help="of sizes, images and noise")

    add = parser.add_argument_group("watching and resuming").add_argument
    add("--validation_steps", type=count(1), default=1000, help="steps between validations")
    add("--validation_samples", type=count(1), default=512, help="noisy images of a validation")
    add("--num_validation_images", type=count(0), default=8, help="images drawn per size at each validation")
    add("--ddpm_num_inference_steps", type=count(1), default=50, help="denoising steps of these images")
    add("--checkpointing_steps", type=count(1), default=1000, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=count(1), help="how many checkpoints are kept; all by default")
    add("--resume_from_checkpoint", help="a checkpoint folder, or 'latest': the newest in the output folder, if any")
    add("--report_to", default="none", help="tracker: tensorboard, wandb, … or none")
    add("--logging_dir", default="logs", help="the tracker's folder, inside the output folder")
    add("--tracker_project_name", default="ofadiff-ddpm", help="the tracker's project")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        setup = set_up(args)
    except ValueError as error:
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, one speaks
        parser.exit(2, f"{parser.prog}: error: {error}\n" if first else None)
    train_and_save(args, setup)


if __name__ == "__main__":
    main()

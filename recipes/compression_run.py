"""What the compress recipes share: their flags, the checks before training, the supernet, the joint run, its report."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, send_to_device
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCardData, create_repo, upload_folder, whoami
from PIL import Image
from safetensors import safe_open

from ofadiff import Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.adapters.size_adapter import ADAPTERS_NAME
from ofadiff.allocation.budgets import BUDGETS
from ofadiff.allocation.width_ladders import ladders
from ofadiff.channels import ChannelGroup
from ofadiff.commands.processes import who_fails
from ofadiff.data.captioned_stream import TextToImageStream
from ofadiff.data.order import Samples, fixed_batches
from ofadiff.denoisers.copies import copy_in
from ofadiff.denoisers.prepare import Prepare
from ofadiff.evaluation.finite import finite_outputs
from ofadiff.importance import CRITERIA
from ofadiff.noise.diffusion import TARGETS
from ofadiff.options import check_options
from ofadiff.profiling.latency import LatencyCosts, latency_table, measure_latency_costs
from ofadiff.reweight import STRATEGIES
from ofadiff.sizes import CONFIG_NAME, MISSED_MARK, SizeTable
from ofadiff.training.checkpoint import DENOISER, check_flags, check_same_run, find_checkpoint, list_checkpoints
from ofadiff.training.losses import denoising_loss
from ofadiff.training.sharding import check_sharding, is_sharded
from ofadiff.training.single_size import SingleSize, trained_weights
from ofadiff.training.train import TrainingResult, run_values, train

TrainData = Samples | TextToImageStream
SampleImages = Callable[[list[torch.Generator]], list[Image.Image]]
# Weights that a copy leaves out: of a variant (`model.fp16.safetensors`), and in other formats.
OTHER_WEIGHTS = re.compile(
    r"(model\.(?!safetensors|bin)[^.]+\.(safetensors|bin))|(\.index\.[^.]+\.json)|(\.(bin|bin\.index\.json|msgpack|ckpt|h5|onnx))$"
)
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Flags that a resumed run may give anew: they say where things are and what is watched, not what is trained. With
# another number of steps the learning rate follows the new schedule from the next step on.
MAY_CHANGE = (
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "config", "max_train_steps"),
    *("pretrained_model_name_or_path", "teacher_model_name_or_path", "train_data_dir", "dataset_name"),
    *("dataset_data_files", "cache_dir", "cache_dir_latents", "dataloader_num_workers", "max_unreadable_fraction"),
    *("train_batch_size", "gradient_accumulation_steps", "importance_batch_size", "gradient_checkpointing"),
    *("validation_steps", "validation_samples", "validation_prompts", "validation_inference_steps", "guidance_scale"),
    *("num_validation_images", "ddpm_num_inference_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("report_to", "logging_dir", "tracker_project_name", "push_to_hub", "hub_model_id", "offload_ema", "allow_tf32"),
)

# What a resumed run is compared with elsewhere, in its own words.
COMPARED_ELSEWHERE = ("seed", "sizes", "budget", "min_keep", "reweight", "reweight_m", "size")
COMPARED_ELSEWHERE += ("lora_rank", "lora_alpha", "lora_target_modules")


@dataclass(frozen=True)
class Setup:
    """What training needs, built and checked."""

    accelerator: Accelerator
    pipeline: DiffusionPipeline
    prepare: Prepare
    train_data: TrainData
    validation_data: Samples | None
    teacher: ModelMixin
    supernet: Supernet | SingleSize
    checkpoint: Path | None
    sample_images: SampleImages  # one image for each generator, at the supernet's size


# (args, full-size denoiser, train_data, prepare, accelerator) -> what is trained, and the checkpoint to resume from.
MakeStudent = Callable[..., tuple[Supernet | SingleSize, Path | None]]

# For each group of flags what adds one to it.
AddTo = dict[str, Callable[..., Any]]


def run_recipe(
    parser: argparse.ArgumentParser,
    set_up: Callable[[argparse.Namespace], Setup],
    train_and_save: Callable[[argparse.Namespace, Setup], TrainingResult],
) -> None:
    """A recipe from the command line: what the user got wrong is one sentence."""
    args = parse_args(parser)
    try:
        setup = set_up(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {who_fails()}{error}\n")
    train_and_save(args, setup)


# Checks, before anything is loaded


def begin(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers; what can be wrong with the flags alone is found out first."""
    check_output_dir(args)
    check_hub(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        flags = {name: value for name, value in vars(args).items() if name not in COMPARED_ELSEWHERE}
        check_flags(checkpoint, flags, MAY_CHANGE)
    return make_accelerator(args)


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
    adapters = next(folder.glob(f"*/{ADAPTERS_NAME}/*"), None)
    if adapters is not None:
        raise ValueError(
            f"--output_dir {folder} has adapters of sizes, {adapters.parent}, which this run would remove; move them "
            "away, or choose another folder"
        )
    if args.resume_from_checkpoint and list_checkpoints(folder):
        return
    # A run that was killed before its first checkpoint leaves these behind.
    own = {args.logging_dir, "samples"} if args.resume_from_checkpoint else set()
    if any(path.name not in own and not path.name.startswith(".checkpoint-") for path in folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} is not empty; choose another one, continue a run with --resume_from_checkpoint "
            "latest, or replace its files with --overwrite_output_dir"
        )


def check_hub(args: argparse.Namespace) -> None:
    """Raises ValueError if the result is to be uploaded and nobody is logged in to the hub."""
    if args.push_to_hub:
        try:
            whoami()
        except OSError as error:
            raise ValueError("--push_to_hub needs a login: run `hf auth login` first") from error


def check_pipeline_folder(name: str, expected: str) -> None:
    """Raises ValueError for a folder that is no diffusers pipeline; hub names pass."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        config = folder / "config.json"
        alone = json.loads(config.read_text()).get("_class_name") if config.is_file() else None
        found = f"it is the folder of a single {alone}" if alone else "it has no model_index.json"
        raise ValueError(f"{name} is not {expected}; {found}")


def check_not_compressed(name: str) -> None:
    """Raises ValueError for the folder of an OFA checkpoint."""
    if any(Path(name).glob(f"*/{CONFIG_NAME}")):
        raise ValueError(f"{name} is compressed already; expected the original model")


def cannot_load(name: str, expected: str, error: Exception) -> ValueError:
    """What to raise where diffusers could not load a pipeline or a part of it."""
    reason = " ".join(str(error).split()) if Path(name).is_dir() else "no such folder, and the hub gave none"
    return ValueError(f"cannot load {name}, expected {expected}; {reason}")


def check_sizes(args: argparse.Namespace, denoiser: ModelMixin, latencies: LatencyCosts | None = None) -> SizeTable:
    """Raises ValueError unless the sizes can be met, and the options fit what was chosen.

    Weights do not matter, so the model may be on the meta device.

    Which sizes in latency can be met is known once it is measured.
    """
    criterion_options(args)
    strategy_options(args)
    groups = find_channel_groups(denoiser)
    alike = {group.name: torch.ones(group.width) for group in groups}
    unknown = args.budget == "latency" and latencies is None
    sizes, budget = ([1.0], "params") if unknown else (args.sizes, args.budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is missed depends on the scores, which come later
        return allocate(denoiser, groups, alike, sizes, budget, args.min_keep, latencies=latencies)


def make_noise_scheduler(name: str, config: Mapping[str, Any]) -> DDPMScheduler:
    """The forward process of a pipeline's scheduler, called `name`."""
    scheduler = DDPMScheduler.from_config(config) if "beta_schedule" in config else None
    if scheduler is None or scheduler.config.prediction_type not in TARGETS:
        raise ValueError(
            f"the scheduler is a {name} with prediction type {config.get('prediction_type')!r}; "
            f"expected a DDPM-style one with {', '.join(TARGETS)}"
        )
    return scheduler


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers as asked for."""
    tracker = None if args.report_to == "none" else args.report_to
    available = [str(known.value) for known in get_available_trackers()]
    if tracker is not None and tracker not in available:
        installed = ", ".join(available) or "no tracker"
        raise ValueError(f"--report_to {args.report_to}: not installed or unknown; installed: {installed}")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker,
        project_dir=Path(args.output_dir) / args.logging_dir,
    )
    check_sharding(accelerator, args.validation_samples)
    if args.use_8bit_adam and is_sharded(accelerator):
        raise ValueError("--use_8bit_adam does not work with FSDP, which splits AdamW's moments over processes")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_same_sizes(args: argparse.Namespace, supernet: Supernet, checkpoint: Path) -> None:
    """Raises ValueError unless the checkpoint has the sizes that were asked for."""
    subnets = supernet.subnets
    saved = {"sizes": list(supernet.sizes), "budget": subnets.budget, "min_keep": subnets.min_keep}
    asked = {"sizes": sorted(args.sizes), "budget": args.budget, "min_keep": args.min_keep}
    for name in saved:
        if saved[name] != asked[name]:
            raise ValueError(f"cannot resume from {checkpoint}: its --{name} is {saved[name]}, not {asked[name]}")


# The supernet and the joint run


def make_supernet(
    args: argparse.Namespace, unet: ModelMixin, train_data: TrainData, prepare: Prepare, accelerator: Accelerator
) -> tuple[Supernet, Path | None]:
    """Rotates, ranks, and gives every size its widths; or takes all that from the checkpoint to resume from."""
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_same_run(
            checkpoint,
            run_values(
                accelerator, train_data, args.train_batch_size, args.seed, args.reweight, strategy_options(args)
            ),
        )
        supernet = Supernet.from_pretrained(checkpoint / DENOISER)
        check_same_sizes(args, supernet, checkpoint)
        accelerator.print(f"Resuming from {checkpoint}")
    else:
        groups = find_channel_groups(unet)
        if args.rotate:
            rotate_attention(unet, groups)
        latencies = None
        if args.budget == "latency":
            latencies = measure_latency(args, unet, groups, accelerator)
            check_sizes(args, unet, latencies)
        scores = score(args, unet, groups, train_data, prepare, accelerator)
        with warnings.catch_warnings():
            if not accelerator.is_main_process:  # one process speaks
                warnings.simplefilter("ignore", UserWarning)
            subnets = allocate(unet, groups, scores, args.sizes, args.budget, args.min_keep, latencies=latencies)
        supernet = Supernet(unet, groups, scores, subnets, provenance=provenance(args))
        if latencies is not None:
            accelerator.wait_for_everyone()  # nobody works beside it
            if accelerator.is_main_process:
                measured = latency_table(supernet, dtype=PRECISIONS[accelerator.mixed_precision])
                print(latency_rows(subnets, measured), end="\n\n")
            accelerator.wait_for_everyone()
    accelerator.print(size_table(supernet))
    return supernet, checkpoint


def measure_latency(
    args: argparse.Namespace, unet: ModelMixin, groups: Sequence[ChannelGroup], accelerator: Accelerator
) -> LatencyCosts:
    """What groups cost in time, in the precision of the run; one process measures for all."""
    measured: list[LatencyCosts | None] = [None]
    accelerator.wait_for_everyone()  # nobody works beside it
    if accelerator.is_main_process:
        timed = copy_in(unet, PRECISIONS[accelerator.mixed_precision]).to(accelerator.device).eval()
        measured = [measure_latency_costs(timed, groups, ladders(groups, args.min_keep))]
    return broadcast_object_list(measured)[0]


def score(
    args: argparse.Namespace,
    unet: ModelMixin,
    groups: Sequence[ChannelGroup],
    train_data: TrainData,
    prepare: Prepare,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Importance of every unit: each process takes its share of the samples, and all get the mean over all samples."""
    unet.to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    options = criterion_options(args)
    # A threshold is a share of the largest loss of all: then every process looks at all samples.
    alone = bool(options.get("loss_threshold"))
    share = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batch_size = args.importance_batch_size or args.train_batch_size
    data = train_data.first(args.importance_samples) if isinstance(train_data, TextToImageStream) else train_data
    batches = fixed_batches(data, args.importance_samples, batch_size, args.seed, "importance", *share)
    samples = len(range(args.importance_samples)[share[0] :: share[1]])
    # bfloat16 ranks as float32 does; float16's gradients would need scaling.
    half = accelerator.mixed_precision == "bf16"
    scores = {group.name: torch.zeros(group.width) for group in groups}
    if samples:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half):
            scores = score_channels(
                unet,
                groups,
                (send_to_device(batch, accelerator.device) for batch in batches),
                functools.partial(denoising_loss, prepare=prepare),
                args.criterion,
                **options,
            )
    if alone or accelerator.num_processes == 1:
        return scores
    sums = {name: score * samples for name, score in scores.items()}
    counts = torch.tensor(float(samples), device=accelerator.device)
    sums = accelerator.reduce(send_to_device(sums, accelerator.device), "sum")
    total = accelerator.reduce(counts, "sum")
    return {name: (summed / total).cpu() for name, summed in sums.items()}


def criterion_options(args: argparse.Namespace) -> dict[str, float]:
    """Options of the criterion that were asked for. Raises ValueError if it does not take them."""
    threshold = args.importance_loss_threshold
    options = {} if threshold is None else {"loss_threshold": threshold}
    check_options(f"--criterion {args.criterion}", CRITERIA[args.criterion], options)
    return options


def strategy_options(args: argparse.Namespace) -> dict[str, float]:
    """Options of the strategy that were asked for. Raises ValueError if it does not take them."""
    options = {} if args.reweight_m is None else {"m": args.reweight_m}
    check_options(f"--reweight {args.reweight}", STRATEGIES[args.reweight], options)
    return options


def provenance(args: argparse.Namespace) -> dict[str, object]:
    """What the checkpoint remembers of how it was made."""
    keys = ("criterion", "importance_samples", "rotate", "reweight", "max_train_steps", "seed")
    values = {"teacher": args.pretrained_model_name_or_path, **{key: getattr(args, key) for key in keys}}
    return {**values, **criterion_options(args), **strategy_options(args)}


def make_optimizer(args: argparse.Namespace, supernet: Supernet | SingleSize) -> torch.optim.Optimizer:
    """AdamW, with its moments in 8 bits if asked for."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes  # an extra that needs a GPU

        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        trained_weights(supernet.model).values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def joint_run(args: argparse.Namespace, setup: Setup, columns: int) -> TrainingResult:
    """Trains one subnet per step; validations draw `columns` images of every size, one for each generator."""
    accelerator, supernet = setup.accelerator, setup.supernet
    if args.gradient_checkpointing:
        supernet.model.enable_gradient_checkpointing()
    optimizer = make_optimizer(args, supernet)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    if accelerator.is_main_process and args.overwrite_output_dir:
        for old in list_checkpoints(args.output_dir):
            shutil.rmtree(old)
    accelerator.init_trackers(args.tracker_project_name, config=flat(vars(args)))
    draw = functools.partial(draw_samples, args, setup, columns) if columns else None
    return train(
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
        strategy_options=strategy_options(args),
        flags=json.loads(json.dumps(vars(args), default=str)),
        teacher=setup.teacher if args.distill_weight or args.feature_distill_weight else None,
        distill_weight=args.distill_weight,
        feature_distill_weight=args.feature_distill_weight,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
        offload_ema=args.offload_ema,
        validation_steps=args.validation_steps,
        validation_samples=args.validation_samples,
        on_validation=draw,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from=setup.checkpoint,
        num_workers=args.dataloader_num_workers,
    )


@torch.no_grad()
def draw_samples(args: argparse.Namespace, setup: Setup, columns: int, step: int) -> None:
    """Writes `samples/{step}.png`: a row per size, a column per seed; trackers get it too. On every process."""
    accelerator, supernet = setup.accelerator, setup.supernet
    images: list[Image.Image] = []
    for size in supernet.sizes:
        generators = [torch.Generator().manual_seed(args.seed + column) for column in range(columns)]
        watched = finite_outputs(setup.pipeline, supernet.model, f"size {size:g} after {step} training steps")
        with supernet.at(size), accelerator.autocast(), watched:
            images += setup.sample_images(generators)
    if not accelerator.is_main_process:
        return
    grid = make_image_grid(images, rows=len(supernet.sizes), cols=columns)
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"{step:06}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [grid]}, step)


# What is saved


def save_around(denoiser_name: str, denoiser: ModelMixin, folder: Path, out: Path, variant: str | None = None) -> None:
    """Writes the original pipeline with another denoiser; every other component stays what it was, byte for byte.

    Where that cannot be (files of a variant, or no safetensors), it is loaded in the dtype that it is stored in and
    saved.

    Args:
        denoiser_name: The component that is replaced.
        denoiser: What takes its place.
        folder: Of the original pipeline.
        out: To write to.
        variant: Of the original's files.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    denoiser.save_pretrained(out / denoiser_name)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name != denoiser_name]
    for name in parts:
        weights = [path for path in (folder / name).glob("*") if path.suffix in (".safetensors", ".bin")]
        plain = [path for path in weights if not OTHER_WEIGHTS.search(path.name)]
        if not weights or (variant is None and plain):
            copy_component(folder / name, out / name)
        else:
            others = {other: None for other in index if isinstance(index[other], list) and other != name}
            pipeline = DiffusionPipeline.from_pretrained(folder, variant=variant, **others)
            loaded = [path for path in weights if variant and re.search(rf"\.{re.escape(variant)}[.-]", path.name)]
            torch.nn.Module.to(pipeline.components[name], stored_dtype(loaded or plain)).save_pretrained(out / name)
    library = type(denoiser).__module__.partition(".")[0]
    index[denoiser_name] = [library, type(denoiser).__name__]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_component(folder: Path, out: Path) -> None:
    """Copies a component's folder, without weights of variants and of other formats than safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        known = OTHER_WEIGHTS.search(path.name) is None and not path.name.startswith(".")
        if path.is_file() and known:
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def stored_dtype(weights: Sequence[Path]) -> torch.dtype:
    """The floating-point dtype of weights in safetensors files; float32 for other files."""
    for path in weights:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
            return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return torch.float32


# The report


def finish(args: argparse.Namespace, setup: Setup, result: TrainingResult) -> TrainingResult:
    """Prints the losses, writes the model card, and uploads the folder if asked for."""
    accelerator, supernet = setup.accelerator, setup.supernet
    if accelerator.is_main_process:
        (Path(args.output_dir) / "README.md").write_text(model_card(args, supernet, result), encoding="utf-8")
        upload(args)
    accelerator.print(loss_table(result))
    accelerator.print(f"{args.output_dir} holds {len(supernet.sizes)} sizes: OFAPipeline.from_pretrained loads it")
    accelerator.end_training()
    return result


def upload(args: argparse.Namespace) -> None:
    """The output folder without checkpoints and logs, to the hub if asked for."""
    if args.push_to_hub:
        name = create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True).repo_id
        logs = ["checkpoint-*", f"{args.logging_dir}/*"]
        upload_folder(
            repo_id=name, folder_path=args.output_dir, ignore_patterns=[*logs, *(f"*/{pattern}" for pattern in logs)]
        )


def size_table(supernet: Supernet | SingleSize) -> str:
    """The sizes, as asked for and as reached."""
    dropping = any(subnet.dropped for subnet in supernet.subnets)
    rows = [f"{'size':>6}  {'parameters':>20}  {'MACs':>20}" + "  branches" * dropping]
    for subnet, (params, macs) in zip(supernet.subnets, costs(supernet).values(), strict=True):
        branches = f"{len(subnet.widths) - len(subnet.dropped)}/{len(subnet.widths)}"
        row = f"{subnet.size:>6g}  {params:>20}  {macs:>20}" + f"  {branches:>8}" * dropping
        rows.append(row + missed_mark(supernet.subnets, subnet.size))
    return "\n".join([*rows, *filter(None, [supernet.subnets.note])])


def missed_mark(subnets: SizeTable, size: float) -> str:
    """What stands behind a size that is off what was asked for."""
    return MISSED_MARK if size in subnets.missed else ""


def latency_rows(subnets: SizeTable, measured: Mapping[str, float]) -> str:
    """What sizes take, beside what was predicted when they were chosen."""
    predicted = {
        f"{subnet.size:g}": f"{subnet.latency_ms / subnets.full_latency_ms:.1%}{missed_mark(subnets, subnet.size)}"
        for subnet in subnets
        if subnet.latency_ms is not None and subnets.full_latency_ms is not None
    }
    rows = [f"{'size':>6}  {'latency on ' + (subnets.processor or ''):>20}  {'predicted':>9}"]
    for name, seconds in measured.items():
        latency = f"{seconds * 1e3:.4g} ms ({seconds / measured['full']:.1%})"
        rows.append(f"{name:>6}  {latency:>20}  {predicted.get(name, ''):>9}")
    return "\n".join([*rows, *filter(None, [subnets.note])])


def costs(supernet: Supernet | SingleSize) -> dict[float, tuple[str, str]]:
    """Parameters and MACs of each size, in words."""
    full = supernet.subnets
    return {
        subnet.size: (
            f"{readable(subnet.params)} ({subnet.params / full.full_params:.1%})",
            f"{readable(subnet.macs)} ({subnet.macs / full.full_macs:.1%})",
        )
        for subnet in full
    }


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


def model_card(args: argparse.Namespace, supernet: Supernet, result: TrainingResult) -> str:
    """The README of the output folder: sizes, costs, losses, data, command."""
    teacher = args.pretrained_model_name_or_path
    metadata = ModelCardData(
        library_name="diffusers",
        base_model=None if Path(teacher).exists() else teacher,
        tags=["ofadiff", "pruning", "diffusion"],
    )
    header = ["size", "parameters", "MACs of one step"]
    rows = {size: [f"{size:g}{missed_mark(supernet.subnets, size)}", *cost] for size, cost in costs(supernet).items()}
    if result.history:
        original = "" if result.teacher_loss is None else f" (original: {result.teacher_loss:.4f})"
        header.append(f"validation loss{original}")
        last = result.history[max(result.history)]
        for size, row in rows.items():
            row.append(f"{last[size]:.4f}")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows.values()))
    table += f"\n\n{supernet.subnets.note}" if supernet.subnets.missed else ""
    return f"""---
{metadata.to_yaml()}
---

# {Path(args.output_dir).name}

{teacher}, compressed to {len(rows)} sizes in one set of weights with ofadiff.

{table}

```python
from ofadiff import OFAPipeline

pipeline = OFAPipeline.from_pretrained("{Path(args.output_dir).name}")
pipeline(..., size={supernet.sizes[0]:g})
pipeline.extract({supernet.sizes[0]:g}).save_pretrained("small")  # a plain diffusers pipeline
```

Trained for {result.steps} steps ({result.seconds / 3600:.1f} h) on {args.train_data_dir or args.dataset_name}:

```
{shlex.join(sys.argv)}
```
"""


def flat(values: dict[str, object]) -> dict[str, object]:
    """Arguments as trackers take them: numbers and strings."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}


# Flags


def parse_args(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line and, where it is silent, from the YAML file that `--config` names."""
    words = sys.argv[1:] if words is None else list(words)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(words)[0].config
    return parser.parse_args([*config_words(parser, path), *words] if path is not None else words)


def config_words(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """A YAML file of flags as words of a command line, so that values are checked alike."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} is not a list of `flag: value` lines")
    words = []
    for name, value in values.items():
        if f"--{name}" not in parser._option_string_actions:
            parser.error(f"--config {path} has {name!r}, which is no flag; --help lists them")
        if value is False:
            words += [f"--no-{name}"] if f"--no-{name}" in parser._option_string_actions else []
        elif value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def count(minimum: int) -> functools.partial:
    """An argument type: a whole number of at least `minimum`."""
    return functools.partial(_count, minimum=minimum)


def _count(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return int(text)


def number(low: float, high: float = math.inf, ends: str = "[]") -> Callable[[str], float]:
    """An argument type: a finite number from `low` to `high`; round brackets in `ends` leave an end out."""
    return functools.partial(_number, low=low, high=high, ends=ends)


def _number(text: str, low: float, high: float, ends: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    inside = low <= value <= high and not (ends[0] == "(" and value == low) and not (ends[1] == ")" and value == high)
    if not inside or not math.isfinite(value):
        beyond = f"of at least {low:g}" if ends[0] == "[" else f"greater than {low:g}"
        where = beyond if high == math.inf else f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {where}")
    return value


POSITIVE = number(0, ends="(]")
AT_LEAST_ZERO = number(0)
SHARE = number(0, 1)
BELOW_ONE = number(0, 1, "[)")


def size(text: str) -> float:
    """An argument type: a fraction in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; sizes are fractions in (0, 1], such as 0.5")
    return value


def compression_parser(description: str) -> tuple[argparse.ArgumentParser, AddTo]:
    """The flags that every compress recipe has; returns what `common_parser` does."""
    parser, adders = common_parser(
        description,
        "pipeline of the original model: a folder or a hub name",
        "pipeline folder to make; must be new or empty",
    )
    adders["data"](
        "--overwrite_output_dir",
        action="store_true",
        help="replace the pipeline and the checkpoints of an earlier run in the output folder",
    )
    add = adders["compression"]
    add("--sizes", type=size, nargs="+", default=[0.4, 0.6, 0.8, 1.0], help="fractions of the full model")
    add("--budget", choices=BUDGETS, default="params", help="what a size is a fraction of")
    add(
        "--min_keep",
        type=float,
        default=0.25,
        help="smallest share of its channels that a layer keeps; 0 drops what would keep under a quarter",
    )
    add("--criterion", choices=sorted(CRITERIA), default="taylor", help="how channels are ranked")
    add("--importance_samples", type=count(1), default=1024, help="noisy images that the ranking looks at")
    add("--importance_batch_size", type=count(1), help="of them per device and forward; --train_batch_size by default")
    add(
        "--importance_loss_threshold",
        type=BELOW_ONE,
        help="of the criterion taylor: leave out images whose loss is under this share of the largest; 0 by default",
    )
    add(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="turn attention heads into the basis of their singular vectors before ranking",
    )
    add = adders["training"]
    add("--reweight", choices=sorted(STRATEGIES), default="linear", help="how the size of each step is drawn")
    add(
        "--reweight_m",
        type=POSITIVE,
        help="of linear (equation 6): how many times more often the smallest size is drawn than the largest; 3 if not "
        "given",
    )
    add("--learning_rate", type=POSITIVE, default=1e-4, help="of AdamW, after warm-up")
    return parser, adders


def common_parser(description: str, model: str, output: str) -> tuple[argparse.ArgumentParser, AddTo]:
    """The flags that every training recipe has, named as in diffusers' training examples where these have one.

    Args:
        description: What the recipe does.
        model: What `--pretrained_model_name_or_path` is.
        output: What `--output_dir` is.

    Returns:
        The parser, and for each of its groups (`data`, `compression`, `training`, `watching`) what adds a flag to it.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of `flag: value` lines; flags on the command line win")
    titles = {"data": "model and data", "watching": "watching and resuming"}
    adders = {
        name: parser.add_argument_group(titles.get(name, name)).add_argument
        for name in ("data", "compression", "training", "watching")
    }

    add = adders["data"]
    add("--pretrained_model_name_or_path", required=True, help=model)
    add("--dataset_name", help="a `datasets` data set: a hub name, or a folder made by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", default="train", help="split of the data set")
    add("--image_column", default="image", help="its column of images")
    add("--cache_dir", help="where what comes from the hub is kept")
    add("--random_flip", action="store_true", help="mirror half of the training images")
    add("--validation_fraction", type=float, default=0.1, help="share of the images held out for validation")
    add("--dataloader_num_workers", type=count(0), default=0, help="processes that load images")
    add("--output_dir", required=True, help=output)

    add = adders["training"]
    add("--distill_weight", type=AT_LEAST_ZERO, default=1.0, help="weight of the distance to the teacher's prediction")
    add("--feature_distill_weight", type=AT_LEAST_ZERO, default=0.0, help="weight of the distance to its block outputs")
    add("--max_train_steps", type=count(0), default=10_000, help="optimizer steps; 0 only cuts")
    add("--train_batch_size", type=count(1), default=16, help="images per device and forward")
    add("--gradient_accumulation_steps", type=count(1), default=1, help="forwards per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="save memory: compute activations twice")
    add("--mixed_precision", choices=tuple(PRECISIONS), help="of forwards; accelerate's configuration by default")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere GPUs and later")
    add("--lr_scheduler", choices=("cosine", "constant_with_warmup"), default="cosine", help="learning rate over time")
    add("--lr_warmup_steps", type=count(0), default=100, help="steps over which the learning rate rises")
    add("--use_8bit_adam", action="store_true", help="keep AdamW's moments in 8 bits; needs bitsandbytes")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="of AdamW")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="of AdamW")
    add(
        "--adam_weight_decay",
        type=AT_LEAST_ZERO,
        default=0.0,
        help="of AdamW; decays channels on steps that do not use them",
    )
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="of AdamW")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradients are clipped to this norm")
    add("--ema_decay", type=BELOW_ONE, default=0.9999, help="largest decay of the average of the weights")
    add("--offload_ema", action="store_true", help="keep that average in main memory; slower")
    add("--seed", type=int, default=0, help="of sizes, images and noise")

    add = adders["watching"]
    add("--validation_steps", type=count(1), default=1000, help="steps between validations")
    add("--validation_samples", type=count(1), default=512, help="noisy images of a validation")
    add("--checkpointing_steps", type=count(1), default=1000, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=count(1), help="how many checkpoints are kept; all by default")
    add(
        "--resume_from_checkpoint",
        help="a checkpoint folder, its name in the output folder, or 'latest': the newest there, if any; what is "
        "trained must be asked for as before",
    )
    add("--report_to", default="none", help="tracker: tensorboard, wandb, … or none")
    add("--logging_dir", default="logs", help="the tracker's folder, inside the output folder")
    add("--tracker_project_name", default="ofadiff", help="the tracker's project")
    add("--push_to_hub", action="store_true", help="upload the result to the hub, without checkpoints")
    add("--hub_model_id", help="name of the repository; the output folder's by default")
    return parser, adders

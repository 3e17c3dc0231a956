"""What can be wrong with a run is found out before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from huggingface_hub import whoami

from ofadiff.reading.names import check_links, resolved
from ofadiff.runs.settings import CONSTANT, STRATEGY, Optimization, Output, RunSettings, Watching
from ofadiff.storage.ofa_config import ADAPTERS_NAME
from ofadiff.storage.output import check_folder
from ofadiff.training.checkpoint import check_flags, find_checkpoint, list_checkpoints, read_flags
from ofadiff.training.sharding import check_sharding, is_sharded

# Flags that a resumed run may give anew: they say where things are and what is watched, not what is trained. With
# another number of steps the learning rate follows the new schedule from the next step on.
MAY_CHANGE = (
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "max_train_steps"),
    *("pretrained_model_name_or_path", "teacher_model_name_or_path", "train_data_dir", "dataset_name"),
    *("dataset_data_files", "cache_dir", "cache_dir_latents", "dataloader_num_workers", "max_unreadable_fraction"),
    *("train_batch_size", "gradient_accumulation_steps", "importance_batch_size", "gradient_checkpointing"),
    "max_skipped_steps",
    *("validation_steps", "validation_samples", "validation_prompts", "validation_inference_steps", "guidance_scale"),
    *("num_validation_images", "checkpointing_steps", "checkpoints_total_limit"),
    *("calls_file", "recordings_dir", "max_recordings_gb"),
    *("report_to", "logging_dir", "tracker_project_name", "push_to_hub", "hub_model_id", "offload_ema", "allow_tf32"),
)

# Of runs of all sizes.
DISTILL_WEIGHT = 4.0

# The share of the steps over which weights are averaged where the learning rate falls to zero, and the longest average.
AVERAGED_SHARE = 0.05
LONGEST_AVERAGE = 0.9999

# Rank of what each size has of its own where nothing is trained.
UNTRAINED_RANK = 8

# What a resumed run is compared with elsewhere, in its own words.
COMPARED_ELSEWHERE = (
    *("seed", "sizes", "budget", "min_keep", "reweight", "reweight_m", "size"),
    *("lora_rank", "lora_alpha", "lora_target_modules"),
)


def begin(settings: RunSettings) -> tuple[Accelerator, Path | None]:
    """Devices, precision and trackers, and the checkpoint to resume from, if any.

    Raises:
        ValueError: If something is wrong with the settings alone.
    """
    check_output_dir(settings)
    check_hub(settings.output)
    folder = Path(settings.model.pretrained_model_name_or_path)
    if folder.is_dir():
        check_links(folder)  # what is not trained will be copied
    accelerator = make_accelerator(settings.optimization, settings.watching, settings.output)
    return accelerator, agreed_checkpoint(settings, accelerator)


def agreed_checkpoint(settings: RunSettings, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, if any; one process looks for it, so that all go on from the same.

    Raises:
        ValueError: As `find_checkpoint`, on every process.
    """
    resume = settings.watching.resume_from_checkpoint
    if resume is None:
        return None
    found: list[str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            checkpoint = find_checkpoint(settings.output.output_dir, resume)
            found = [None if checkpoint is None else str(checkpoint), None]
        except ValueError as error:
            found = [None, str(error)]
    path, mistake = broadcast_object_list(found)
    if mistake is not None:
        raise ValueError(mistake)
    return None if path is None else Path(path)


def check_same_flags(checkpoint: Path, settings: RunSettings) -> None:
    """Raises ValueError if a run is asked for something else than the one that wrote a checkpoint."""
    flags = {name: value for name, value in settings.flags().items() if name not in COMPARED_ELSEWHERE}
    check_flags(checkpoint, flags, MAY_CHANGE)


def default_optimizer(settings: RunSettings, accelerator: Accelerator, checkpoint: Path | None) -> str:
    """What trains all sizes where no optimizer was asked for; a resumed run goes on with the one that it had."""
    if checkpoint is not None:
        return read_flags(checkpoint).get("optimizer", "adamw")
    return "adamw" if settings.optimization.use_8bit_adam or is_sharded(accelerator) else "muon"


def with_own_defaults(settings: RunSettings, accelerator: Accelerator, checkpoint: Path | None) -> RunSettings:
    """With what depends on the rest of what was asked for, on the machine, and on a checkpoint to resume from."""
    saved = {} if checkpoint is None else read_flags(checkpoint)
    return with_schedule(settings, checkpoint).with_defaults(
        {
            "optimizer": default_optimizer(settings, accelerator, checkpoint),
            "correction_rank": default_correction_rank(settings),
            "correction_ridge": saved.get("correction_ridge"),
            "distill_weight": saved.get("distill_weight", DISTILL_WEIGHT),
            "reweight": saved.get("reweight", STRATEGY),
        }
    )


def with_schedule(settings: RunSettings, checkpoint: Path | None) -> RunSettings:
    """With draws of noise levels, a learning rate over time and an average that suits it; a resumed run goes on with
    those that it had.
    """
    saved = {} if checkpoint is None else read_flags(checkpoint)
    new = "linear" if settings.one_size is None else "cosine"
    stratified = checkpoint is None or saved.get("stratify_timesteps", False)
    settings = settings.with_defaults(
        {"lr_scheduler": saved.get("lr_scheduler", new), "stratify_timesteps": stratified}
    )
    steps, constant = settings.optimization.max_train_steps, settings.optimization.lr_scheduler == CONSTANT
    assert steps is not None
    decay = LONGEST_AVERAGE if constant or not steps else 1 - 1 / (AVERAGED_SHARE * steps)
    return settings.with_defaults({"ema_decay": saved.get("ema_decay", min(max(decay, 0.0), LONGEST_AVERAGE))})


def default_correction_rank(settings: RunSettings) -> int:
    """Sizes that are not trained keep what they need for themselves."""
    untrained = settings.optimization.max_train_steps == 0
    return UNTRAINED_RANK if untrained and settings.compression.correction_samples else 0


def check_output_dir(settings: RunSettings) -> None:
    """Raises ValueError unless the output folder is new or empty, or may be resumed or overwritten."""
    output, watching = settings.output, settings.watching
    folder, resume = Path(output.output_dir), watching.resume_from_checkpoint
    if output.overwrite_output_dir and resume:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other")
    data, model = settings.data.train_data_dir, settings.model.pretrained_model_name_or_path
    read = [data] if settings.one_size is not None and settings.one_size.lora_rank else [data, model]
    check_folder("--output_dir", folder, read)
    if resolved(folder) == resolved(model):
        raise ValueError(f"--output_dir {folder} is the pretrained model's own folder")
    if output.overwrite_output_dir or not folder.exists():
        return
    adapters = next(folder.glob(f"*/{ADAPTERS_NAME}/*"), None)
    if adapters is not None:
        raise ValueError(
            f"--output_dir {folder} has adapters of sizes, {adapters.parent}, which this run would remove; move them "
            "away, or choose another folder"
        )
    if resume and list_checkpoints(folder):
        return
    # A run that was killed before its first checkpoint leaves these behind.
    own = {watching.logging_dir, "samples"} if resume else set()
    if any(path.name not in own and not path.name.startswith(".checkpoint-") for path in folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} is not empty; choose another one, continue a run with --resume_from_checkpoint "
            "latest, or replace its files with --overwrite_output_dir"
        )


def check_hub(output: Output) -> None:
    """Raises ValueError if the result is to be uploaded and nobody is logged in to the hub."""
    if output.push_to_hub:
        try:
            whoami()
        except OSError as error:
            raise ValueError("--push_to_hub needs a login: run `hf auth login` first") from error


def make_accelerator(optimization: Optimization, watching: Watching, output: Output) -> Accelerator:
    """Devices, precision and trackers as asked for.

    Raises:
        ValueError: If something for them is not installed, or does not work together.
    """
    tracker = None if watching.report_to == "none" else watching.report_to
    available = [str(known.value) for known in get_available_trackers()]
    if tracker is not None and tracker not in available:
        installed = ", ".join(available) or "no tracker"
        raise ValueError(f"--report_to {watching.report_to}: not installed or unknown; installed: {installed}")
    if optimization.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if optimization.use_8bit_adam and optimization.optimizer == "muon":
        raise ValueError("--use_8bit_adam is for --optimizer adamw; Muon keeps no moments in 8 bits")
    accelerator = Accelerator(
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        mixed_precision=optimization.mixed_precision,
        log_with=tracker,
        project_dir=Path(output.output_dir) / watching.logging_dir,
    )
    check_sharding(accelerator, watching.validation_samples)
    if optimization.use_8bit_adam and is_sharded(accelerator):
        raise ValueError("--use_8bit_adam does not work with FSDP, which splits AdamW's moments over processes")
    if optimization.optimizer == "muon" and is_sharded(accelerator):
        raise ValueError(
            "--optimizer muon does not work with FSDP, which splits matrices over processes: choose --optimizer adamw, "
            "or plain multi-GPU in `accelerate config`"
        )
    if optimization.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator

"""Healing: one size of a checkpoint is trained alone, as a LoRA beside its weights or as a plain model."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import ModelMixin

from ofadiff.adapters.lora_training import add_lora
from ofadiff.adapters.size_adapter import (
    SizeAdapter,
    adapter_folder,
    load_largest_adapter,
    load_size_adapter,
    save_size_adapter,
)
from ofadiff.basis import load_basis
from ofadiff.denoisers.kind import CAPTIONS
from ofadiff.denoisers.original import Original, cannot_load, read_any_original, read_original
from ofadiff.dtypes import PRECISIONS
from ofadiff.extraction.subnet import extract
from ofadiff.reading.names import resolved
from ofadiff.runs.checks import begin, check_same_flags, with_schedule
from ofadiff.runs.recorded import build_recorded
from ofadiff.runs.result import upload
from ofadiff.runs.run import Run, build, frozen_copy, with_defaults_of
from ofadiff.runs.settings import OneSize, RunSettings
from ofadiff.runs.sizes import schedule_of
from ofadiff.runs.tables import loss_table, size_table
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.around import copy_pipeline, save_around
from ofadiff.storage.digest import digest_of_weights
from ofadiff.storage.finite import check_finite_weights
from ofadiff.storage.ofa_config import denoiser_class, read_ofa_config
from ofadiff.storage.output import check_folder
from ofadiff.storage.pipeline_folder import download_own_files, find_denoiser, local_folder
from ofadiff.storage.strangers import check_model
from ofadiff.training.bundles import TrainingResult
from ofadiff.training.checkpoint import DENOISER, check_same_run, list_checkpoints
from ofadiff.training.interrupts import finished_first
from ofadiff.training.single_size import SingleSize
from ofadiff.training.train import run_values
from ofadiff.unet_elastic import find_channel_groups

# What holds where nothing else is asked for; the rest is as for the joint run that made the checkpoint.
HEALING_DEFAULTS = {
    "max_train_steps": 20_000,
    "lr_warmup_steps": 100,
    "tracker_project_name": "ofadiff-finetune",
    "optimizer": "adamw",
}
LORA_LEARNING_RATE, SUBNET_LEARNING_RATE = 1e-4, 2e-5

# What of a teacher's denoiser has to be the checkpoint's.
SAME = ("_class_name", "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim", "num_embeds_ada_norm")


def start_healing(settings: RunSettings) -> Run:
    """Everything before the training of one size; the checkpoint at full size teaches, unless another teacher is given.

    Args:
        settings: With `one_size`; the model is an OFA checkpoint.

    Raises:
        ValueError: If something the user gave cannot work.
    """
    one, model = settings.one_size, settings.model
    assert one is not None
    where = {"cache_dir": model.cache_dir, "revision": model.revision, "variant": model.variant}
    folder = local_folder(model.pretrained_model_name_or_path, where)
    component = find_denoiser(folder, settings.calls.component)
    one = dataclasses.replace(one, size=SizeTable.from_dict(read_ofa_config(folder / component)).find(one.size).size)
    model = dataclasses.replace(model, pretrained_model_name_or_path=str(folder))
    settings = with_recordings_dir(dataclasses.replace(settings, model=model, one_size=one))
    check_output(settings, component)
    check_teacher(settings, component)
    original = read_checkpoint(settings, component)
    if settings.data.resolution is None and original.kind.condition == CAPTIONS:
        data = dataclasses.replace(settings.data, resolution=original.own_resolution)
        settings = dataclasses.replace(settings, data=data)
    learning_rate = LORA_LEARNING_RATE if one.lora_rank else SUBNET_LEARNING_RATE
    settings = settings.with_defaults({**HEALING_DEFAULTS, "learning_rate": learning_rate})
    settings = with_defaults_of(settings, original).with_defaults({"distill_weight": 1.0})
    run_settings = settings_of_training(settings)
    accelerator, checkpoint = begin(run_settings)
    run_settings = with_schedule(run_settings, checkpoint)
    if checkpoint is not None:
        check_same_flags(checkpoint, run_settings)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}; one size is trained whole on every "
            "device: choose plain multi-GPU in `accelerate config`"
        )
    if settings.calls.given:
        teacher = original_teacher(one, component, model.cache_dir)
        return build_recorded(run_settings, accelerator, original, checkpoint, teacher)
    run = build(run_settings, accelerator, original, checkpoint)
    if one.teacher_model_name_or_path is None:
        return run
    stock = denoiser_class(folder / component)
    return dataclasses.replace(run, teacher=load_teacher(settings, stock, component, accelerator))


def read_checkpoint(settings: RunSettings, component: str) -> Original:
    """The checkpoint as the pretrained pipeline that it is at full size.

    Raises:
        ValueError: If it cannot be trained on what is given.
    """
    model, calls = settings.model, settings.calls
    where = model.revision, model.variant, model.cache_dir
    if not calls.given:
        return read_original(model.pretrained_model_name_or_path, None, *where)
    return read_any_original(model.pretrained_model_name_or_path, component, *where)


def original_teacher(one: OneSize, component: str, cache_dir: str | None) -> Original | None:
    """The pipeline that is recorded if the checkpoint is not; None if it is."""
    name = one.teacher_model_name_or_path
    return None if name is None else read_any_original(name, component, cache_dir=cache_dir)


def with_recordings_dir(settings: RunSettings) -> RunSettings:
    """Settings that say where recordings are: where the compression has put the original's, if that teaches."""
    one, calls, out = settings.one_size, settings.calls, settings.output.output_dir.rstrip("/")
    assert one is not None
    if calls.calls_file is None or calls.recordings_dir is not None:
        return settings
    if one.teacher_model_name_or_path is None:
        out = f"{out}-full-size"
    return dataclasses.replace(settings, calls=dataclasses.replace(calls, recordings_dir=f"{out}-recordings"))


def settings_of_training(settings: RunSettings) -> RunSettings:
    """What the training run is asked for: a LoRA's checkpoints, logs and samples go into a folder of their own."""
    one = settings.one_size
    assert one is not None
    if not one.lora_rank:
        return settings
    folder = Path(settings.output.output_dir) / f"finetune-{one.size:g}"
    return dataclasses.replace(settings, output=dataclasses.replace(settings.output, output_dir=str(folder)))


def make_single_size(run: Run) -> SingleSize:
    """The extracted size, with its adapter merged or a new LoRA in it.

    Raises:
        ValueError: If the checkpoint to resume from is another run's.
    """
    one, model_settings, optimization = run.settings.one_size, run.settings.model, run.settings.optimization
    assert one is not None
    directory = Path(model_settings.pretrained_model_name_or_path) / run.original.component
    table = SizeTable.from_dict(read_ofa_config(directory)).only(one.size)
    widths = table[0].widths
    groups = [group for group in find_channel_groups(run.denoiser) if group.name in widths]
    model = extract(run.denoiser, groups, widths, load_basis(directory))
    if run.original.kind.begin_training is not None:
        run.original.kind.begin_training(model)
    start = digest_of_weights(model)
    healed = None if one.lora_rank else load_size_adapter(directory, table[0].size)
    if healed is not None:
        healed.merge_into(model)
    if one.lora_rank:
        add_lora(model, groups, one.lora_rank, one.lora_alpha, one.lora_target_modules, optimization.seed)
    single = SingleSize(model, table, groups, {"start": start, **description_of(one)})
    if run.checkpoint is not None:
        check_same_run(run.checkpoint, run_values(run.accelerator, run.data.training, schedule_of(run)))
        single.check(run.checkpoint / DENOISER)
        run.accelerator.print(f"Resuming from {run.checkpoint}")
    run.accelerator.print(size_table(single.subnets))
    return single


def description_of(one: OneSize) -> dict[str, Any]:
    """What a resumed run must have asked for as well."""
    keys = ("size", "lora_rank", "lora_alpha", "lora_target_modules")
    return {key: getattr(one, key) for key in keys}


def save_healed(run: Run, single: SingleSize, result: TrainingResult, output_dir: str | Path) -> None:
    """Writes the adapter, into the checkpoint or a copy of it, or the subnet's pipeline folder.

    Args:
        run: What was asked for.
        single: As training left it.
        result: What training reported.
        output_dir: Where the result goes: of a LoRA, the folder above that of its training.
    """
    accelerator, one, component = run.accelerator, run.settings.one_size, run.original.component
    assert one is not None
    folder, out = run.original.folder, Path(output_dir)
    if accelerator.is_main_process:
        with finished_first(f"{out} is written"):
            if one.lora_rank:
                if resolved(out) != resolved(folder):
                    copy_pipeline(folder, out)
                save_size_adapter(SizeAdapter.from_model(single.model), out / component, single.sizes[0])
            else:
                save_around(component, single.model, folder, out, run.original.variant)
        output = dataclasses.replace(run.settings.output, output_dir=str(out))
        upload(dataclasses.replace(run.settings, output=output))
    accelerator.print(loss_table(result))
    size = f"{single.sizes[0]:g}"
    what = f"has an adapter of size {size}" if one.lora_rank else f"is size {size}, a plain pipeline"
    accelerator.print(f"{out} {what}")
    accelerator.end_training()


# Checks, before anything is loaded


def check_output(settings: RunSettings, component: str) -> None:
    """Raises ValueError unless what is to be trained can be made, and put where it shall be."""
    one, watching = settings.one_size, settings.watching
    assert one is not None
    folder, out = Path(settings.model.pretrained_model_name_or_path), Path(settings.output.output_dir)
    training = Path(settings_of_training(settings).output.output_dir)
    check_folder("--output_dir", out, [str(folder)])
    if not one.lora_rank:
        if one.lora_alpha is not None or one.lora_target_modules is not None:
            raise ValueError("--lora_alpha and --lora_target_modules are for a LoRA; give its --lora_rank")
        if (out / component / CONFIG_NAME).exists():
            raise ValueError(f"--output_dir {out} holds all sizes; give another folder for this one, or a --lora_rank")
        return
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_rank needs peft, which is not installed: pip install peft")
    resumed = watching.resume_from_checkpoint is not None and bool(list_checkpoints(training))
    if out.is_dir() and resolved(out) != resolved(folder) and not resumed and set(out.iterdir()) - {training}:
        raise ValueError(
            f"--output_dir {out} is not empty; give {folder} itself for the adapter, or a new folder for a copy "
            "with it; to add an adapter to a copy that has some, give the copy as --pretrained_model_name_or_path too"
        )
    assert not isinstance(one.size, str)  # found in the table
    existing = adapter_folder(folder / component, one.size)
    if existing.exists() and not (resumed or settings.output.overwrite_output_dir):
        raise ValueError(f"size {one.size:g} has an adapter already, {existing}; replace it with --overwrite")


def check_teacher(settings: RunSettings, component: str) -> None:
    """Raises ValueError unless the teacher's denoiser takes and gives what the checkpoint's does."""
    one, model = settings.one_size, settings.model
    assert one is not None
    name = one.teacher_model_name_or_path
    if name is None:
        check_not_own_teacher(settings, component)
        return
    stock = denoiser_class(Path(model.pretrained_model_name_or_path) / component)
    ours = stock.load_config(model.pretrained_model_name_or_path, subfolder=component)
    try:
        theirs = stock.load_config(name, subfolder=component, cache_dir=model.cache_dir)
    except (OSError, ValueError) as error:
        raise cannot_load(name, f"a pipeline with a {stock.__name__}", error) from error
    for key in SAME:
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"the teacher's {component} has {key} {theirs.get(key)}, the checkpoint's has {ours.get(key)}"
            )


def check_not_own_teacher(settings: RunSettings, component: str) -> None:
    """Raises ValueError if the size is the one that teaches, and would learn from itself.

    The whole weights teach on images, the largest size on recordings.
    """
    one, losses = settings.one_size, settings.losses
    assert one is not None
    directory = Path(settings.model.pretrained_model_name_or_path) / component
    subnets = SizeTable.from_dict(read_ofa_config(directory))
    distilled = losses.distill_weight != 0 or losses.feature_distill_weight
    if one.size == subnets.sizes[-1] and (settings.calls.given or (distilled and subnets.has_whole)):
        alone = "" if settings.calls.given else ", or --distill_weight 0 to learn from the data alone"
        raise ValueError(
            f"size {one.size:g} is the checkpoint's largest, which teaches its other sizes and cannot teach itself: "
            f"give the original as --teacher_model_name_or_path{alone}"
        )


def load_teacher(
    settings: RunSettings, stock: type[ModelMixin], component: str, accelerator: Accelerator
) -> ModelMixin:
    """The denoiser of another pipeline, frozen, in the run's precision."""
    assert settings.one_size is not None and settings.one_size.teacher_model_name_or_path is not None
    name, options = settings.one_size.teacher_model_name_or_path, {"cache_dir": settings.model.cache_dir}
    precision = PRECISIONS[accelerator.mixed_precision]
    try:
        if Path(name).is_dir():
            check_model(Path(name) / component, stock)
        folder = Path(name) if Path(name).is_dir() else download_own_files(name, **options)
        # What it has at full size is merged before the weights are cast.
        adapter = load_largest_adapter(folder / component, whole=True)
        loaded = precision if adapter is None else torch.float32
        teacher = stock.from_pretrained(name, subfolder=component, torch_dtype=loaded, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise cannot_load(name, f"a pipeline with a {stock.__name__}", error) from error
    check_finite_weights(teacher, f"the {component} of {name}")
    return teacher.requires_grad_(False) if adapter is None else frozen_copy(teacher, precision, adapter)

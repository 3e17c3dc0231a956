"""A run, built and checked: all that training needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ofadiff.adapters.size_adapter import SizeAdapter, load_largest_adapter
from ofadiff.denoisers.copies import copy_in
from ofadiff.denoisers.encoder import Encoder
from ofadiff.denoisers.kind import CALLS, DenoiserKind
from ofadiff.denoisers.original import Original, check_not_compressed, read_original
from ofadiff.denoisers.prepare import Prepare, prepare_batch
from ofadiff.dtypes import PRECISIONS
from ofadiff.recordings.folder import Recordings
from ofadiff.runs.checks import begin, check_same_flags, with_own_defaults
from ofadiff.runs.data import RunData, encode_data, load_data, open_latent_cache
from ofadiff.runs.settings import DEFAULTS, RunSettings
from ofadiff.runs.size_checks import check_sizes
from ofadiff.training.sharding import is_sharded, split_alone


@dataclass(frozen=True)
class Run:
    """What training needs.

    Attributes:
        settings: What was asked for, with defaults where nothing was.
        accelerator: Devices, precision and trackers.
        original: What the pretrained pipeline's configuration says.
        pipeline: The pretrained pipeline.
        denoiser: The original denoiser.
        data: The images, or recordings.
        prepare: Makes the denoiser's inputs of a batch.
        teacher: The original denoiser, frozen, in the precision of the run; None where answers were recorded.
        checkpoint: To resume from, or None.
        pipeline: The pretrained pipeline; None where nothing but the denoiser is needed.
        encode: The frozen half of the pipeline; None without it.
        recordings: What the denoiser is trained on in place of images, and its costs are measured on.
    """

    settings: RunSettings
    accelerator: Accelerator
    original: Original
    denoiser: Any
    data: RunData
    prepare: Prepare
    teacher: nn.Module | None
    checkpoint: Path | None
    pipeline: DiffusionPipeline | None = None
    encode: Encoder | None = None
    recordings: Recordings | None = None


def start(settings: RunSettings, kinds: Sequence[DenoiserKind] | None = None) -> Run:
    """Everything before the sizes: what can be wrong is found out first, then data and models are loaded.

    Args:
        settings: What is asked for.
        kinds: Kinds of denoisers that may be compressed; by default all that can be trained.

    Raises:
        ValueError: If something the user gave cannot work.

    Example:
        >>> settings = RunSettings(Model(pretrained_model_name_or_path="ddpm"), Data(train_data_dir="images"), output)
        >>> run = start(settings)
        >>> groups = find_channel_groups(run.denoiser)
    """
    accelerator, checkpoint = begin(settings)
    model = settings.model
    check_not_compressed(model.pretrained_model_name_or_path)
    where = model.revision, model.variant, model.cache_dir
    original = read_original(model.pretrained_model_name_or_path, kinds, *where)
    settings = with_defaults_of(settings, original)
    settings = with_own_defaults(settings, accelerator, checkpoint)
    check_run(settings, accelerator, original, checkpoint)
    return build(settings, accelerator, original, checkpoint)


def check_run(settings: RunSettings, accelerator: Accelerator, original: Original, checkpoint: Path | None) -> None:
    """Raises ValueError if a model cannot be compressed as it is asked for, as far as its configuration says."""
    if checkpoint is not None:
        check_same_flags(checkpoint, settings)
    if is_sharded(accelerator):
        split_alone(accelerator, original.denoiser, original.kind.split_alone)
    compression = settings.compression
    if is_sharded(accelerator) and compression.budget == "latency":
        raise ValueError(
            "--budget latency does not work with FSDP, as the time of a model is measured on one device that holds all "
            "of it: choose --budget params or macs, or plain multi-GPU in `accelerate config`"
        )
    images = settings.data.train_data_dir is not None or settings.data.dataset_name is not None
    if is_sharded(accelerator) and settings.calls.given and images:
        raise ValueError(
            "images among recordings do not work with FSDP, whose processes have to call the model equally often: "
            "leave out --train_data_dir and --dataset_name, or choose plain multi-GPU in `accelerate config`"
        )
    if settings.one_size is None and compression.correction_rank and settings.optimization.max_train_steps:
        raise ValueError(
            f"--correction_rank {compression.correction_rank} is for sizes that are not trained (--max_train_steps 0); "
            f"this run trains {settings.optimization.max_train_steps} steps, after which those LoRAs would not fit"
        )
    if compression.correction_rank and not compression.correction_samples:
        raise ValueError("--correction_rank needs --correction_samples to be above 0")
    # What costs are measured on may have to be recorded first.
    check_sizes(settings.compression, original.denoiser, counted=original.kind.condition != CALLS)


def with_defaults_of(settings: RunSettings, original: Original, images: DenoiserKind | None = None) -> RunSettings:
    """Settings with what training of this kind needs where nothing was asked for.

    Args:
        settings: What was asked for.
        original: Its kind says what training needs.
        images: The kind that it is where images are mixed into recordings.

    Raises:
        ValueError: If there are flags that such a model has not.
    """
    settings.check_condition(original.kind, original.name, images)
    defaults = {**DEFAULTS, **original.kind.training_defaults}
    if images is not None and "resolution" in images.training_defaults:
        defaults["resolution"] = images.training_defaults["resolution"]
    return settings.with_defaults(defaults)


def build(settings: RunSettings, accelerator: Accelerator, original: Original, checkpoint: Path | None) -> Run:
    """Loads data and models. Raises ValueError if something the user gave cannot work."""
    pipeline, data, prepare, encode = build_inputs(settings, accelerator, original)
    denoiser = pipeline.components[original.component]
    adapter = load_largest_adapter(original.folder / original.component, whole=True)
    teacher = frozen_copy(denoiser, PRECISIONS[accelerator.mixed_precision], adapter)
    if original.kind.begin_training is not None:
        original.kind.begin_training(denoiser)
    return Run(settings, accelerator, original, denoiser, data, prepare, teacher, checkpoint, pipeline, encode)


def frozen_copy(denoiser: ModelMixin, dtype: torch.dtype, adapter: SizeAdapter | None = None) -> ModelMixin:
    """A teacher: a copy in a precision, with what an adapter adds to the weights merged before they are cast."""
    if adapter is not None:
        denoiser = copy_in(denoiser, torch.float32)
        adapter.merge_into(denoiser)
    return copy_in(denoiser, dtype).requires_grad_(False)


def build_inputs(
    settings: RunSettings, accelerator: Accelerator, original: Original
) -> tuple[DiffusionPipeline, RunData, Prepare, Encoder]:
    """The pipeline, its images, what makes inputs of them, and its frozen half. Raises ValueError as `build`."""
    kind, config, losses = original.kind, original.denoiser.config, settings.losses
    forward_process = original.forward_process(losses.snr_gamma, losses.noise_offset)
    precision = PRECISIONS[accelerator.mixed_precision]
    data = load_data(settings, original, accelerator)
    cache = open_latent_cache(settings, original, data, precision)
    accelerator.wait_for_everyone()

    # The frozen parts; with cached latents the encoders leave the device once everything is encoded.
    pipeline = original.load()
    null_class = None if kind.null_class is None else kind.null_class(config)
    encode = Encoder(pipeline, kind, null_class, settings.classes.class_dropout_prob)
    for module in encode.modules:
        freeze_in(module, precision)
    encode.to(accelerator.device)
    if cache is not None:
        data = encode_data(data, cache, encode, accelerator, settings.data.dataloader_num_workers)
        encode.to("cpu")
    prepare = functools.partial(
        prepare_batch,
        kind=kind,
        config=config,
        forward_process=forward_process,
        encode=encode if cache is None else None,
    )
    return pipeline, data, prepare, encode


def freeze_in(module: nn.Module, precision: torch.dtype) -> None:
    """Casts a frozen part of a pipeline, whatever dtype it was stored in; what float16 is too small for to float32."""
    config = module.config if isinstance(module, ModelMixin) else {}
    upcast = precision == torch.float16 and config.get("force_upcast")
    # Not the method of diffusers models, which warns about every cast.
    nn.Module.to(module, torch.float32 if upcast else precision)

"""A run on recordings: the pipeline's own calls are recorded, then its denoiser is all that is loaded."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ofadiff.adapters.size_adapter import load_largest_adapter, tensors_of
from ofadiff.data import order
from ofadiff.data.mixed_samples import MixedSamples
from ofadiff.denoisers.original import (
    Original,
    absent_components,
    cannot_load,
    check_not_compressed,
    read_any_original,
    read_original,
)
from ofadiff.denoisers.prepare import Prepare, prepare_mixed, prepare_recorded
from ofadiff.denoisers.recorded import answered_channels
from ofadiff.dtypes import PRECISIONS, torch_dtype_taken
from ofadiff.pipelines.calls import check_calls, described, parsed_value, read_calls
from ofadiff.pipelines.ofa_pipeline import OFAPipeline, stock_pipeline_class
from ofadiff.pipelines.recording import record
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.recordings.folder import DESCRIPTION_NAME, Recordings, check_same_model, read_description, recorded_calls
from ofadiff.recordings.joining import can_be_joined
from ofadiff.recordings.samples import RecordedSamples
from ofadiff.runs.checks import begin, with_own_defaults
from ofadiff.runs.data import RunData
from ofadiff.runs.run import Run, build_inputs, check_run, frozen_copy, with_defaults_of
from ofadiff.runs.settings import Calls, RunSettings
from ofadiff.runs.size_checks import check_sizes
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.finite import check_finite_pipeline, check_finite_weights
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.strangers import check_model, check_pipeline
from ofadiff.training.sharding import is_sharded

# Recorded calls that joining is tried on.
TRIED = 8


def recordings_folder(settings: RunSettings) -> Path:
    """Where the recordings of a run are."""
    return Path(settings.calls.recordings_dir or f"{settings.output.output_dir.rstrip('/')}-recordings")


def call_arguments(calls: Calls) -> dict[str, Any]:
    """The arguments of all calls.

    Raises:
        ValueError: If one is not NAME=VALUE.
    """
    words = [word.partition("=") for word in calls.call_arguments or ()]
    for name, sign, value in words:
        if not (name and sign):
            raise ValueError(f"--call_arguments {name}{sign}{value}: write NAME=VALUE, such as num_inference_steps=20")
    return {name: value if "prompt" in name else parsed_value(value) for name, _, value in words}


def pipeline_class(original: Original) -> type[DiffusionPipeline]:
    """The class of a pipeline's folder.

    Raises:
        ValueError: If diffusers has none of that name.
    """
    return stock_pipeline_class(original.folder, original.denoiser)


def checked_calls(original: Original, calls: Calls) -> list[dict[str, Any]]:
    """The calls of a file, found to be calls of this pipeline. Raises ValueError for one that is not."""
    assert calls.calls_file is not None
    folder = Path(calls.calls_file).parent
    return check_calls(pipeline_class(original), read_calls(calls.calls_file), call_arguments(calls), folder)


def load_whole_pipeline(original: Original, dtype: torch.dtype) -> Any:
    """The pipeline as a user would load it. Raises ValueError if it cannot be loaded, or its weights are not finite."""
    without = absent_components(DiffusionPipeline.load_config(original.folder))
    sized = any(original.folder.glob(f"*/{CONFIG_NAME}"))
    loader = OFAPipeline if sized else pipeline_class(original)
    try:
        check_pipeline(original.folder, original.variant, without)
        with torch_dtype_taken(), in_one_sentence(f"{original.folder} cannot be loaded"):
            options = {"variant": original.variant, "torch_dtype": dtype, "use_safetensors": True}
            pipeline = loader.from_pretrained(original.folder, **options, **without)
    except (AttributeError, OSError, ValueError) as error:
        raise cannot_load(original.name, f"a {pipeline_class(original).__name__}", error) from error
    check_finite_pipeline(pipeline, original.name)
    return pipeline


def make_recordings(
    original: Original, calls: Calls, folder: Path, dtype: torch.dtype, seed: int, device: torch.device
) -> Recordings:
    """Records what of a file's calls is not recorded yet; all processes share the work.

    Args:
        original: The pipeline.
        calls: What is asked for.
        folder: Where the recordings are, or shall be.
        dtype: Of the pipeline while it samples.
        seed: Of its noise, and of the steps that are kept.
        device: Where it samples.

    Raises:
        ValueError: If a call cannot be made, or the folder holds other recordings.
    """
    if calls.calls_file is None:
        return Recordings(folder)
    checked = checked_calls(original, calls)
    if is_recorded(folder, [described(call) for call in checked], calls.steps_per_call, seed):
        return Recordings(folder)
    pipeline = load_whole_pipeline(original, dtype).to(device)
    limit = None if calls.max_recordings_gb is None else round(calls.max_recordings_gb * 1e9)
    return record(pipeline, checked, folder, calls.steps_per_call, seed, component=original.component, max_bytes=limit)


def is_recorded(folder: Path, calls: list[Any], steps_per_call: int, seed: int) -> bool:
    """Whether a folder holds all recordings of some calls; the model is compared once it is loaded."""
    if not (folder / DESCRIPTION_NAME).is_file():
        return False
    description = read_description(folder)
    asked = {"calls": calls, "steps_per_call": steps_per_call, "seed": seed}
    return all(description[name] == value for name, value in asked.items()) and len(recorded_calls(folder)) == len(
        calls
    )


def recorded_data(recordings: Recordings, fraction: float, seed: int, joined: bool) -> RunData:
    """Training and validation samples; of a call of the pipeline all steps are on the same side.

    Raises:
        ValueError: If the fraction leaves nothing to train on.
    """
    numbers = recordings.pipeline_calls
    training, validation = order.hold_out(len(numbers), fraction, seed)
    sides = []
    for side in (training, validation):
        chosen = {numbers[position] for position in side}
        sides.append([index for index in range(len(recordings)) if recordings.pipeline_call(index) in chosen])
    held_out = RecordedSamples(recordings, sides[1], joined) if sides[1] else None
    return RunData(RecordedSamples(recordings, sides[0], joined), held_out)


def load_denoiser(original: Original) -> Any:
    """The denoiser alone, in full precision. Raises ValueError if it cannot be loaded, or is not finite."""
    stock = type(original.denoiser)
    try:
        check_model(original.folder / original.component, stock, original.variant)
        denoiser = stock.from_pretrained(
            original.folder, subfolder=original.component, variant=original.variant, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise cannot_load(original.name, f"a pipeline with a {stock.__name__}", error) from error
    check_finite_weights(denoiser, f"the {original.component} of {original.name}")
    return denoiser.float()


def start_recorded(settings: RunSettings) -> Run:
    """Like `start`, for a pipeline of any class: what can be wrong is found out first, then it is recorded.

    Args:
        settings: With `calls`.

    Raises:
        ValueError: If something the user gave cannot work.

    Example:
        >>> settings = RunSettings(model, Data(), output, calls=Calls(calls_file="prompts.txt"))
        >>> run = start_recorded(settings)
        >>> groups = find_channel_groups(run.denoiser)
    """
    model, calls = settings.model, settings.calls
    if not calls.given:
        raise ValueError("give the pipeline's calls with --calls_file, or recordings of them with --recordings_dir")
    accelerator, checkpoint = begin(settings)
    check_not_compressed(model.pretrained_model_name_or_path, calls.component)
    where = model.revision, model.variant, model.cache_dir
    original = read_any_original(model.pretrained_model_name_or_path, calls.component, *where)
    mixed = None
    if settings.data.train_data_dir is not None or settings.data.dataset_name is not None:
        try:
            mixed = read_original(model.pretrained_model_name_or_path, None, *where)
        except ValueError as error:
            raise ValueError(
                f"images (--train_data_dir, --dataset_name) are mixed into recordings of what can be trained on them; "
                f"{error}"
            ) from error
        if mixed.component != original.component:
            raise ValueError(f"images train the {mixed.component} of {original.name}, not its {original.component}")
    settings = with_defaults_of(settings, original, None if mixed is None else mixed.kind)
    settings = with_own_defaults(settings, accelerator, checkpoint)
    if settings.compression.criterion == "taylor":
        raise ValueError(
            "--criterion taylor ranks by the loss, which is zero against the original's own answers; choose sensitivity"
        )
    check_run(settings, accelerator, original, checkpoint)
    check_sizes_of_others(settings, original)
    if mixed is None:
        return build_recorded(settings, accelerator, original, checkpoint)
    if calls.calls_file is not None:
        checked_calls(original, calls)
    # Images are read before anything is sampled, so that what is wrong with them is said then.
    _, images, prepare_images, _ = build_inputs(settings, accelerator, mixed)
    return with_images(build_recorded(settings, accelerator, original, checkpoint), images, prepare_images)


def with_images(run: Run, images: RunData, prepare_images: Prepare) -> Run:
    """A run on recordings with images among its training samples; it is still ranked and validated on recordings."""
    recorded = run.data.training
    assert isinstance(recorded, RecordedSamples)
    prepare = functools.partial(prepare_mixed, recorded=run.prepare, images=prepare_images)
    data = RunData(MixedSamples(recorded, images.training), run.data.validation)
    return dataclasses.replace(run, data=data, prepare=prepare)


def check_sizes_of_others(settings: RunSettings, original: Original) -> None:
    """Raises ValueError if a denoiser of the pipeline is compressed already, to other sizes: they move together."""
    for file in sorted(original.folder.glob(f"*/{CONFIG_NAME}")):
        sizes = SizeTable.from_dict(read_ofa_config(file.parent)).sizes
        if sizes != tuple(sorted(settings.compression.sizes)):
            raise ValueError(
                f"--sizes are {settings.compression.sizes}, those of the pipeline's {file.parent.name} {sizes}; sizes "
                "of one pipeline move together, so they must be the same"
            )


def build_recorded(
    settings: RunSettings,
    accelerator: Accelerator,
    original: Original,
    checkpoint: Path | None,
    teacher: Original | None = None,
) -> Run:
    """Records, and loads what training needs: the denoiser, and the teacher where its block outputs are asked for.

    Args:
        settings: What is asked for.
        accelerator: Devices and precision.
        original: The pipeline whose denoiser is trained.
        checkpoint: To resume from, or None.
        teacher: The pipeline that is recorded, if it is another one.

    Raises:
        ValueError: If something the user gave cannot work.
    """
    seed, fraction = settings.optimization.seed, settings.data.validation_fraction
    precision = PRECISIONS[accelerator.mixed_precision]
    folder = recordings_folder(settings)
    recorded = original if teacher is None else teacher
    recordings = make_recordings(recorded, settings.calls, folder, precision, seed, accelerator.device)
    accelerator.print(
        f"{len(recordings)} recorded calls of the {recorded.component}, of {len(recordings.pipeline_calls)} calls of "
        f"the pipeline, {recordings.bytes / 1e6:.1f} MB in {recordings.folder}"
    )
    denoiser = load_denoiser(original)
    taught_by = denoiser if teacher is None else load_denoiser(teacher)
    adapter = load_largest_adapter(recorded.folder / recorded.component)
    check_same_model(recordings, pipeline_class(recorded).__name__, recorded.component, taught_by, tensors_of(adapter))
    denoiser.eval()
    if settings.compression.budget == "macs" and settings.one_size is None:
        check_sizes(settings.compression, denoiser, inputs=recordings)
    # Processes that split the weights have to call the model equally often, so there each call is a forward.
    joined = not is_sharded(accelerator)
    if joined:
        denoiser.to(accelerator.device)
        joined = can_be_joined(denoiser, [call.to(accelerator.device) for call in recordings[:TRIED]])
    assert fraction is not None
    data = recorded_data(recordings, fraction, seed, joined)
    frozen = None
    if settings.losses.feature_distill_weight:
        adapter = load_largest_adapter(recorded.folder / recorded.component, whole=True)
        frozen = frozen_copy(taught_by, recordings.dtype, adapter)
    if original.kind.begin_training is not None:
        original.kind.begin_training(denoiser)
    prepare = functools.partial(prepare_recorded, channels=answered_channels(denoiser.config))
    return Run(settings, accelerator, original, denoiser, data, prepare, frozen, checkpoint, recordings=recordings)

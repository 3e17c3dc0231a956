"""One report over every size of a checkpoint."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.data import Subset

from ofadiff.data.images import Images
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.evaluation.candidates import Candidate, list_candidates
from ofadiff.evaluation.finite import NotFiniteError
from ofadiff.evaluation.image_protocol import call_protocol, image_protocol
from ofadiff.evaluation.metrics import consistency
from ofadiff.evaluation.metrics.clip_scorer import DEFAULT_CLIP, ClipScorer
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.metric import Subject
from ofadiff.evaluation.metrics.table import METRICS, choose_metrics
from ofadiff.evaluation.reference import RESIZE, Reference
from ofadiff.evaluation.report.report import Report
from ofadiff.evaluation.report.rows import MISSED_NOTE, PARAMETERS, REACHED, TEACHER, Column, Row
from ofadiff.evaluation.sampling import Sampling, draw_share, evaluation_mode
from ofadiff.evaluation.saved_images import SavedImages
from ofadiff.evaluation.share import Processes, Share
from ofadiff.pipelines import OFAPipeline
from ofadiff.profiling.cost import count_macs, count_parameters
from ofadiff.profiling.memory import PEAKS
from ofadiff.profiling.timing import REPEATS, ROUNDS, measure_latencies, processor_name

# Fewer images than this have no KID.
FEWEST = 4
# Denoising steps of the trial image.
TRIAL_STEPS = 2


def evaluate(
    pipeline: DiffusionPipeline,
    *,
    reference: str | Path | Images | torch.Tensor | None = None,
    teacher: DiffusionPipeline | None = None,
    compare: Mapping[str, DiffusionPipeline] | None = None,
    sizes: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    num_samples: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    num_inference_steps: int = 50,
    arguments: Mapping[str, Sequence[Any]] | None = None,
    call_arguments: Mapping[str, Any] | None = None,
    extractor: str = "inception",
    clip_model: str | Path = DEFAULT_CLIP,
    cost_batch_size: int = 1,
    num_shown: int = 10,
    samples_dir: str | Path | None = None,
    overwrite_samples: bool = False,
    save_reference_statistics: str | Path | None = None,
    title: str = "One model, every size",
    command: str | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Report:
    """Measures every size of a pipeline, and its teacher, from the same seeds.

    What is measured is the extracted model of each size: what ships. Of several processes each samples its share of the
    images; the report is the same as that of one, and every process gets it.

    Args:
        pipeline: An `OFAPipeline`, or any other pipeline for a report of one row.
        reference: Real images for FID and KID: a folder, `Images`, or uint8 `(N, 3, H, W)`. For FID alone also a file
            of their statistics, see `FeatureStatistics.load`.
        teacher: Pipeline of the original model, with the same scheduler.
        compare: More pipelines by name, with the same scheduler: other sets of sizes, or plain ones.
        sizes: Which sizes, all by default.
        metrics: Names in `METRICS`; by default all that can be had from what is given.
        num_samples: Images sampled per size, if a metric looks at images.
        batch_size: Images per call of a pipeline.
        seed: Seed of the first image, see `generate`.
        num_inference_steps: Denoising steps.
        arguments: What the pipeline's call takes for each image, see `generate`; prompts are `{"prompt": [...]}`.
        call_arguments: What the call takes once, for all images, such as `{"guidance_scale": 7.5}`.
        extractor: Features for FID and KID: `"inception"`, another of torch-fidelity's, or a registered one.
        clip_model: CLIP for the CLIP score of images and prompts: a folder or a hub repository, see `ClipScorer`.
        cost_batch_size: Images of the forward whose latency and memory are measured.
        num_shown: Images per size that the report shows.
        samples_dir: Folder to keep the images in. An evaluation that was cut off goes on from those that are there;
            images made in another way are refused. By default images are held in memory.
        overwrite_samples: Replace images that another evaluation left there.
        save_reference_statistics: A `.safetensors` to write the statistics of the reference images to.
        title: The report's.
        command: The command line that makes this report, if there is one.
        progress: Whether to show progress bars.
        accelerator: Of a script that `accelerate launch` runs in several processes; the pipelines are on its device.

    Returns:
        The report, the teacher first, then the sizes from the largest down, then what they are compared with.

    Raises:
        ImportError: If torch-fidelity, scikit-image or transformers is needed and not installed.
        ValueError: Before sampling, but for a trial image of each model: if a metric, size or extractor does not exist,
            a metric lacks what it needs, a pipeline lacks prompts or takes no such argument, a scheduler differs from
            the others or ignores seeds, the reference or the CLIP model cannot be read or used, or `samples_dir` holds
            other images.
        NotFiniteError: If a model gives values that are not finite: names the size, the step and the sample.

    Example:
        >>> report = evaluate(OFAPipeline.from_pretrained("my-ofa-checkpoint"), reference="images", num_samples=10_000)
        >>> report.write("report")
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("num_shown", num_shown)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    processes = Processes(accelerator)
    show = progress and processes.is_main
    statistics = read_statistics(reference)
    candidates = list_candidates(pipeline, teacher, compare or {}, sizes)
    missing = missing_reference(reference is not None, statistics) | _missing(candidates, arguments or {})
    names = choose_metrics(metrics, missing)
    needs = {need for name in names for need in METRICS[name].needs}
    sampling = Sampling.of(pipeline, seed, num_inference_steps, arguments, call_arguments)
    for candidate in candidates:
        sampling.check(candidate.source)
    count = num_samples if "images" in needs else num_shown
    if save_reference_statistics is not None and (reference is None or statistics or "reference" not in needs):
        raise ValueError("save_reference_statistics needs reference images, and a metric that looks at them")

    real = features = clip = None
    if "reference" in needs:
        if reference is not None and statistics is None:
            real = Reference(reference, progress, processes)
        _check_counts(count, real)
        with processes.main_first():
            features = FeatureExtractor(extractor, pipeline.device)
        if statistics is not None:
            statistics.check_extractor(features.name)
    if "prompts" in needs:
        with processes.main_first():
            clip = ClipScorer(str(clip_model), pipeline.device)

    trials = _try_all(candidates, sampling)
    height, width = trials[0].shape[-2:]
    resolution = f"{width}x{height}"
    if "ssim" in names:
        consistency.ssim(trials[0], trials[0])
    if clip is not None:
        clip.scores(trials[0], sampling.condition([0])["prompt"])
    if features is not None and statistics is not None:
        statistics.check_shape(features.features(trials[0]).shape[1], resolution)
    stores = _open_stores(candidates, sampling, resolution, samples_dir, overwrite_samples, processes)

    real_features = None
    if real is not None and features is not None:
        share = Share(len(real), batch_size, processes)
        images = Subset(real.images(height, width), share.indices)
        real_features = share.gather(features.features(images, batch_size, show))
        statistics = FeatureStatistics.of(real_features, extractor=features.name, resize=RESIZE, resolution=resolution)
        if save_reference_statistics is not None and processes.is_main:
            statistics.save(save_reference_statistics)
    latencies: dict[str, float] = {}
    if "latency" in names:
        processes.wait()  # nobody samples beside it
        if processes.is_main:
            latencies = measure_latencies(
                lambda: _denoisers(candidates), partial(example_inputs, batch_size=cost_batch_size)
            )
        processes.wait()

    budget = _budget(pipeline, teacher)
    columns: dict[str, Column] = {} if budget is None else {"reached": REACHED}
    columns["params"] = PARAMETERS
    for name in names:
        columns.update(METRICS[name].columns)
    report = Report(title, columns)
    share = Share(count, batch_size, processes)
    teacher_images = None
    for candidate in candidates:
        row, stand_alone, store = candidate.row, candidate.load(), stores.pop(candidate.name)
        draw_share(stand_alone, sampling, share, store, show, f"Sampling {candidate.name}", name=row.name)
        images = Subset(store, share.indices)  # type: ignore[arg-type]
        denoiser = denoiser_of(stand_alone)
        subject = Subject(
            denoiser=denoiser,
            images=images,
            arguments=sampling.condition(share.indices),
            gather=share.gather,
            is_main=processes.is_main,
            teacher_images=teacher_images,
            reference=statistics,
            reference_features=real_features,
            extractor=features,
            clip=clip,
            latency=latencies.get(candidate.name),
            batch_size=batch_size,
            cost_batch_size=cost_batch_size,
        )
        row.values["params"] = count_parameters(denoiser)
        if budget is not None:
            spent, full = budget
            row.values["reached"] = spent(denoiser) / full
        with evaluation_mode(stand_alone):
            for name in names:
                if "images" in METRICS[name].needs or processes.is_main:
                    row.values.update(METRICS[name].measure(subject))
        row.values = processes.broadcast(row.values)
        _check_finite(row)
        shown = processes.gather([(index, store[index]) for index in share.indices if index < num_shown])
        report.add_row(row, torch.stack([image for _, image in sorted(shown, key=_first)]))
        if row.series == TEACHER:
            teacher_images = images

    protocol = {
        "samples per size": count if "images" in needs else None,
        "resolution": f"{resolution} pixels",
        "denoising steps": num_inference_steps,
        **call_protocol(pipeline, sampling.call_arguments),
        "prompts": min(count, len(sampling.arguments["prompt"])) if "prompt" in sampling.arguments else None,
        "seeds": f"{seed} to {seed + count - 1}, one per image",
        "batches": f"{batch_size} images, {processes.count} process{'es' if processes.count > 1 else ''}",
        "scheduler": type(pipeline.components["scheduler"]).__name__ if "scheduler" in pipeline.components else None,
        "budget": pipeline.subnets.budget if isinstance(pipeline, OFAPipeline) else None,
        "features": features.name if features else None,
        "resized for the features": features.resize if features else None,
        **_reference_protocol(reference, real, statistics if features else None),
        "CLIP score": f"mean cosine (w = 1), {_last_part(clip_model)}" if clip else None,
        "latency": (
            f"one forward of the denoiser, batch of {cost_batch_size}: median of {ROUNDS} rounds over all models, "
            f"{REPEATS} forwards each"
            if "latency" in names
            else None
        ),
        "memory": (
            f"peak of one forward of the denoiser, batch of {cost_batch_size}, {pipeline.device.type.upper()}: its "
            "weights and what PyTorch allocates"
            if "memory" in names
            else None
        ),
        "precision": str(denoiser_of(pipeline).dtype).removeprefix("torch."),
        **describe_machine(pipeline.device),
        "command": command,
    }
    report.protocol = {name: value for name, value in protocol.items() if value is not None}
    if any(map(report.missed, report.rows)):
        report.protocol["sizes"] = MISSED_NOTE
    return report


def _check_finite(row: Row) -> None:
    for name, value in row.values.items():
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(
                f"{name} of {row.name} ({row.series}) is {value}; no report is made of what means nothing"
            )


def read_statistics(reference: Any) -> FeatureStatistics | None:
    """The statistics, if the reference is a file of them; see `FeatureStatistics.load`."""
    is_file = isinstance(reference, str | Path) and Path(reference).is_file()
    return FeatureStatistics.load(reference) if is_file else None


def missing_reference(given: bool, statistics: FeatureStatistics | None) -> dict[str, str]:
    """What metrics cannot have for want of reference images, each with the reason."""
    if not given:
        return dict.fromkeys(("reference", "reference images"), "there are no reference images")
    if statistics is not None:
        return {"reference images": "there are statistics of the reference images, and it needs the images"}
    return {}


def describe_machine(device: torch.device) -> dict[str, str]:
    """The processor that does the work, and the versions of what runs on it."""
    return {
        "processor": processor_name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def _missing(candidates: Sequence[Candidate], arguments: Mapping[str, Any]) -> dict[str, str]:
    """What metrics may need and cannot have, each with the reason."""
    missing = {}
    if not any(candidate.row.series == TEACHER for candidate in candidates):
        missing["teacher"] = "there is no teacher"
    if "prompt" not in arguments:
        missing["prompts"] = "there are no prompts"
    for candidate in candidates:
        denoiser = denoiser_of(candidate.source)
        device = next(denoiser.parameters()).device.type
        if device not in PEAKS:
            missing["memory"] = f"the model is on {device!r}; peak memory is measured on {' and '.join(PEAKS)}"
        try:
            example_inputs(denoiser)
        except ValueError as error:
            missing["inputs"] = str(error)
    return missing


def _check_counts(count: int, real: Reference | None) -> None:
    if real is None and count < FEWEST:
        raise ValueError(f"there are {count} samples; FID takes {FEWEST}")
    if real is not None and min(count, len(real)) < FEWEST:
        raise ValueError(
            f"there are {count} samples and {len(real)} reference images; FID and KID take {FEWEST} of each"
        )


def _try_all(candidates: Sequence[Candidate], sampling: Sampling) -> list[torch.Tensor]:
    """One image of each, in a few steps: what can go wrong does so now, and not hours later."""
    trial = replace(sampling, num_inference_steps=min(TRIAL_STEPS, sampling.num_inference_steps))
    images = []
    for candidate in candidates:
        stand_alone = candidate.load()
        with evaluation_mode(stand_alone):
            images.append(trial.draw(stand_alone, [0], name=candidate.row.name))
        if images[-1].shape != images[0].shape:
            shapes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in images]
            raise ValueError(
                f"{candidates[0].name} makes images of {shapes[0]} pixels, {candidate.name} of {shapes[-1]}; they "
                "must be of one resolution"
            )
    return images


def _open_stores(
    candidates: Sequence[Candidate],
    sampling: Sampling,
    resolution: str,
    folder: str | Path | None,
    overwrite: bool,
    processes: Processes,
) -> dict[str, SavedImages | dict[int, torch.Tensor]]:
    """Where the images of each candidate go: into memory, or beside those that are in its folder already."""
    if folder is None:
        return {candidate.name: {} for candidate in candidates}
    stores = {candidate.name: SavedImages(Path(folder) / candidate.name) for candidate in candidates}
    digests: dict[nn.Module, str] = {}
    protocols = {each.name: image_protocol(each.load(), sampling, resolution, digests) for each in candidates}
    for name, store in stores.items():
        store.check(protocols[name], overwrite)
    processes.broadcast(None)  # all of them have looked before the first one writes
    if processes.is_main:
        for name, store in stores.items():
            if overwrite:
                store.remove()
            store.begin(protocols[name])
    processes.broadcast(None)
    return dict(stores)


def _denoisers(candidates: Sequence[Candidate]) -> Iterator[tuple[str, nn.Module]]:
    for candidate in candidates:
        stand_alone = candidate.load()
        with evaluation_mode(stand_alone):
            yield candidate.name, denoiser_of(stand_alone)


def _reference_protocol(
    reference: Any, real: Reference | None, statistics: FeatureStatistics | None
) -> dict[str, str | int]:
    if real is not None:
        return {"reference images": len(real), "reference resized": RESIZE}
    if statistics is None:
        return {}
    images = "images" if statistics.count is None else f"{statistics.count} images"
    return {
        "reference": f"statistics of {images}, {Path(reference).name}",
        "reference resized": statistics.resize or "not stated in the statistics",
    }


def _last_part(name_or_path: str | Path) -> str:
    """A hub repository as it is, of an absolute path the last part: reports travel, machines don't."""
    return Path(name_or_path).name if Path(name_or_path).is_absolute() else str(name_or_path)


def _first(pair: tuple[int, torch.Tensor]) -> int:
    return pair[0]


def _budget(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline | None
) -> tuple[Callable[[nn.Module], int], int] | None:
    """What a size is a share of: how it is counted, and how much of it the full model has."""
    if not isinstance(pipeline, OFAPipeline):
        return None if teacher is None else (count_parameters, count_parameters(denoiser_of(teacher)))
    if pipeline.subnets.budget == "latency":
        return None  # the measured latency has a column of its own
    if pipeline.subnets.budget == "macs":
        return count_macs, pipeline.subnets.full_macs
    return count_parameters, pipeline.subnets.full_params

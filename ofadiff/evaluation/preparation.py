"""What an evaluation needs, checked before images are sampled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.data import Subset

from ofadiff.data.images import Images
from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.evaluation.candidates import Candidate
from ofadiff.evaluation.image_protocol import image_protocol
from ofadiff.evaluation.metrics import consistency
from ofadiff.evaluation.metrics.clip_scorer import ClipScorer
from ofadiff.evaluation.metrics.costs import cost_inputs
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.table import METRICS
from ofadiff.evaluation.reference import RESIZE, Reference
from ofadiff.evaluation.report.rows import TEACHER
from ofadiff.evaluation.sampling import Sampling, evaluation_mode
from ofadiff.evaluation.saved_images import SavedImages
from ofadiff.evaluation.settings import EvaluationSettings
from ofadiff.evaluation.share import Processes, Share
from ofadiff.pipelines import OFAPipeline
from ofadiff.profiling.cost import count_macs, count_parameters
from ofadiff.profiling.memory import PEAKS
from ofadiff.reading.arguments import check_path
from ofadiff.recordings.folder import Recordings, check_same_model

# Fewer images than this have no KID.
FEWEST = 4

# Denoising steps of the trial image.
TRIAL_STEPS = 2

# Images by index, on disk or in memory.
Store: TypeAlias = SavedImages | dict[int, torch.Tensor]


def read_statistics(reference: Any) -> FeatureStatistics | None:
    """The statistics, if the reference is a file of them; see `FeatureStatistics.load`.

    Raises:
        ValueError: If it is neither that nor what images may be: None, a path, `Images`, or a tensor of four axes.
    """
    if isinstance(reference, torch.Tensor):
        if reference.ndim != 4:
            raise ValueError(f"reference is of shape {tuple(reference.shape)}; it must be (N, 3, H, W)")
    elif reference is not None and not isinstance(reference, Images):
        check_path("reference", reference)
    is_file = isinstance(reference, str | Path) and Path(reference).is_file()
    return FeatureStatistics.load(reference) if is_file else None


def missing_reference(given: bool, statistics: FeatureStatistics | None) -> dict[str, str]:
    """What metrics cannot have for want of reference images, each with the reason."""
    if not given:
        return dict.fromkeys(("reference", "reference images"), "there are no reference images")
    if statistics is not None:
        return {"reference images": "there are statistics of the reference images, and it needs the images"}
    return {}


def sampling_of(pipeline: DiffusionPipeline, settings: EvaluationSettings) -> Sampling:
    """How samples are drawn. Raises ValueError if a call cannot be made."""
    asked = settings.arguments, settings.call_arguments, settings.calls
    return Sampling.of(pipeline, settings.seed, settings.num_inference_steps, *asked)


def has_prompts(settings: EvaluationSettings) -> bool:
    """Whether every sample has a prompt."""
    if settings.calls is None:
        return "prompt" in (settings.arguments or {})
    return all(isinstance(call if isinstance(call, str) else call.get("prompt"), str) for call in settings.calls)


def missing_needs(candidates: Sequence[Candidate], settings: EvaluationSettings) -> dict[str, str]:
    """What metrics may need and cannot have, each with the reason.

    Raises:
        ValueError: If recordings are of something else.
    """
    missing = {}
    recordings = settings.recordings
    if recordings is None:
        missing["recordings"] = "there are no recordings"
    for candidate in candidates:
        if recordings is not None:
            check_same_model(recordings, type(candidate.source).__name__, candidate.component)
        if recordings is not None and settings.arguments is None and settings.calls is None:
            # Recordings are enough for a report; samples are drawn of what needs no arguments.
            try:
                sampling_of(candidate.source, settings).check(candidate.source)
            except ValueError as error:
                missing["images"] = str(error)
    if not any(candidate.row.series == TEACHER for candidate in candidates):
        missing["teacher"] = "there is no teacher"
    if not has_prompts(settings):
        missing["prompts"] = "there are no prompts"
    for candidate in candidates:
        denoiser = candidate.source.components[candidate.component]
        device = next(denoiser.parameters()).device.type
        if device not in PEAKS:
            missing["memory"] = f"the model is on {device!r}; peak memory is measured on {' and '.join(PEAKS)}"
        try:
            cost_inputs(denoiser, 1, recordings)
        except ValueError as error:
            missing["inputs"] = str(error)
    return missing


def check_fid_seeds(fid_seeds: int, names: Sequence[str]) -> None:
    """Raises ValueError if FID is wanted over several seeds, and is none of the metrics of these names."""
    if fid_seeds > 1 and "fid" not in names:
        raise ValueError(f"fid_seeds is {fid_seeds}, but FID is not measured; it needs reference images or statistics")


def check_counts(count: int, real: Reference | None, names: Sequence[str], neighborhood: int) -> None:
    """Raises ValueError if there are too few images for FID and its like."""
    if real is None and count < FEWEST:
        raise ValueError(f"there are {count} samples; FID takes {FEWEST}")
    if real is not None and min(count, len(real)) < FEWEST:
        raise ValueError(
            f"there are {count} samples and {len(real)} reference images; FID and KID take {FEWEST} of each"
        )
    asked = [name for name in ("precision", "recall") if name in names]
    if asked and real is not None and min(count, len(real)) <= neighborhood:
        take = "take" if len(asked) > 1 else "takes"
        raise ValueError(
            f"there are {count} samples and {len(real)} reference images; {' and '.join(asked)} with prc_neighborhood "
            f"{neighborhood} {take} {neighborhood + 1} of each"
        )


def try_all(candidates: Sequence[Candidate], sampling: Sampling) -> list[torch.Tensor]:
    """One image of each, in a few steps, `(1, F, 3, H, W)`: what can go wrong does so now, and not hours later."""
    trial = replace(sampling, num_inference_steps=min(TRIAL_STEPS, sampling.num_inference_steps))
    images = []
    for candidate in candidates:
        stand_alone = candidate.load()
        with evaluation_mode(stand_alone):
            images.append(trial.draw_frames(stand_alone, [0], candidate.added, candidate.row.name))
        if images[-1].shape != images[0].shape:
            shapes = [shape_in_words(image) for image in images]
            raise ValueError(
                f"{candidates[0].name} makes images of {shapes[0]} pixels, {candidate.name} of {shapes[-1]}; they "
                "must be of one resolution"
            )
    return images


def shape_in_words(image: torch.Tensor) -> str:
    """Resolution of a sample `(1, F, 3, H, W)`, and how many frames it has if it is a video."""
    frames, _, height, width = image.shape[1:]
    return f"{width}x{height}" if frames == 1 else f"{frames} frames of {width}x{height}"


def open_stores(
    candidates: Sequence[Candidate],
    samplings: Sequence[Sampling],
    resolution: str,
    folder: str | Path | None,
    overwrite: bool,
    processes: Processes,
) -> dict[str, list[Store]]:
    """Where the images of each candidate go: into memory, or beside those that are in its folder already.

    There is a store for each of the samplings, which differ in their seeds.
    """
    if folder is None:
        return {candidate.name: [{} for _ in samplings] for candidate in candidates}
    # No name of a candidate has a "=".
    folders = [Path(folder), *(Path(folder) / f"seed={sampling.seed}" for sampling in samplings[1:])]
    stores: dict[str, list[Store]] = {}
    begun: list[tuple[SavedImages, dict[str, Any]]] = []
    digests: dict[nn.Module, str] = {}
    for candidate in candidates:
        protocol = image_protocol(candidate.load(), samplings[0], resolution, digests, candidate.added)
        saved = [SavedImages(each / candidate.name) for each in folders]
        stores[candidate.name] = [*saved]
        seeds = [{"first seed": sampling.seed} for sampling in samplings]
        begun += [(store, protocol | seed) for store, seed in zip(saved, seeds, strict=True)]
    for store, protocol in begun:
        store.check(protocol, overwrite)
    processes.broadcast(None)  # all of them have looked before the first one writes
    if processes.is_main:
        for store, protocol in begun:
            if overwrite:
                store.remove()
            store.begin(protocol)
    processes.broadcast(None)
    return stores


def denoisers_of(candidates: Sequence[Candidate]) -> Iterator[tuple[str, nn.Module]]:
    """The stand-alone denoiser of each that has one, in eval mode, one after the other."""
    for candidate in candidates:
        if candidate.added:
            continue
        stand_alone = candidate.load()
        with evaluation_mode(stand_alone):
            yield candidate.name, stand_alone.components[candidate.component]


def budget_of(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline | None, recordings: Recordings | None = None
) -> tuple[Callable[[nn.Module], int], int] | None:
    """What a size is a share of: how it is counted, and how much of it the full model has."""
    if not isinstance(pipeline, OFAPipeline):
        return None if teacher is None else (count_parameters, count_parameters(denoiser_of(teacher)))
    if pipeline.subnets.budget == "latency":
        return None  # the measured latency has a column of its own
    if pipeline.subnets.budget == "macs" and pipeline.subnets.full_macs is not None:
        return functools.partial(count_macs, inputs=recordings), pipeline.subnets.full_macs
    return count_parameters, pipeline.subnets.full_params


@dataclass
class Instruments:
    """What metrics measure with.

    Attributes:
        count: Images of each model.
        real: The reference images; None without any, and where there are their statistics.
        statistics: Statistics of the reference's features, once it was read.
        features: What extracts features.
        clip: What scores images against prompts.
        reference_features: Features of the reference images, `(M, D)`, once they were read.
    """

    count: int
    real: Reference | None = None
    statistics: FeatureStatistics | None = None
    features: FeatureExtractor | None = None
    clip: ClipScorer | None = None
    reference_features: torch.Tensor | None = None

    def try_on(self, images: torch.Tensor, names: Sequence[str], sampling: Sampling, resolution: str) -> None:
        """Measures a trial image. Raises ValueError if that cannot work."""
        if "ssim" in names:
            consistency.ssim(images, images)
        if self.clip is not None:
            self.clip.scores(images[:1], sampling.condition([0])["prompt"])
        if self.features is not None and self.statistics is not None:
            self.statistics.check_shape(self.features.features(images).shape[1], resolution)

    def read_reference(self, height: int, width: int, settings: EvaluationSettings, processes: Processes) -> None:
        """Features of the reference images at the resolution of the samples; every process takes its share."""
        if self.real is None or self.features is None:
            return
        share = Share(len(self.real), settings.batch_size, processes)
        images = Subset(self.real.images(height, width), share.indices)
        show = settings.progress and processes.is_main
        features = share.gather(self.features.features(images, settings.batch_size, show))
        made_of = {"extractor": self.features.name, "resize": RESIZE, "resolution": f"{width}x{height}"}
        self.reference_features, self.statistics = features, FeatureStatistics.of(features, **made_of)
        if settings.save_reference_statistics is not None and processes.is_main:
            self.statistics.save(settings.save_reference_statistics)


def make_instruments(
    device: torch.device,
    reference: str | Path | Images | torch.Tensor | None,
    statistics: FeatureStatistics | None,
    names: Sequence[str],
    settings: EvaluationSettings,
    processes: Processes,
) -> Instruments:
    """Loads what the metrics of these names measure with.

    Raises:
        ImportError: If something for it is not installed.
        ValueError: If the reference, the extractor or the CLIP model cannot be read, or there are too few images.
    """
    needs = {need for name in names for need in METRICS[name].needs}
    count = settings.num_samples if "images" in needs else settings.num_shown
    if settings.save_reference_statistics is not None and (reference is None or statistics or "reference" not in needs):
        raise ValueError("save_reference_statistics needs reference images, and a metric that looks at them")
    check_fid_seeds(settings.fid_seeds, names)
    made = Instruments(count, statistics=statistics)
    if "reference" in needs:
        if reference is not None and statistics is None:
            made.real = Reference(reference, settings.progress, processes)
        check_counts(count, made.real, names, settings.prc_neighborhood)
        with processes.main_first():
            made.features = FeatureExtractor(settings.extractor, device)
        if statistics is not None:
            statistics.check_extractor(made.features.name)
    if "prompts" in needs:
        with processes.main_first():
            made.clip = ClipScorer(str(settings.clip_model), device)
    return made

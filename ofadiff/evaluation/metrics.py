"""The metrics, and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ofadiff.cost import count_macs, example_inputs
from ofadiff.evaluation import consistency
from ofadiff.evaluation.clip_score import ClipScorer
from ofadiff.evaluation.extractors import FeatureExtractor
from ofadiff.evaluation.feature_statistics import FeatureStatistics
from ofadiff.evaluation.fid import frechet_distance
from ofadiff.evaluation.kid import kernel_distance
from ofadiff.evaluation.measure import measure_peak_memory
from ofadiff.evaluation.report import Column


@dataclass(frozen=True)
class Subject:
    """A model under evaluation; a metric finds here what it said that it needs.

    Of several processes each has its share of the samples. A metric that looks at images is measured by all of them,
    and `gather`s a value per image; a metric that looks at none, by the main process alone.

    Attributes:
        denoiser: Stand-alone: an extracted model, or the teacher.
        images: This process' n samples, each uint8 `(3, H, W)`.
        arguments: What these samples were asked for with, n values per name (labels, prompts).
        gather: Values of this process' samples `(n, …)` to those of all N samples `(N, …)`.
        is_main: Whether this is the main process, whose values count.
        teacher_images: The teacher's samples from the same seeds; None for the teacher itself.
        reference: Statistics of the reference features.
        reference_features: These features, `(M, D)`.
        extractor: What extracts them.
        clip: What scores images against prompts.
        latency: Seconds per forward, measured in turns with the other models.
        batch_size: Images per forward when features are extracted.
        cost_batch_size: Images of the forward whose latency and memory are measured.
    """

    denoiser: nn.Module
    images: Dataset[torch.Tensor]
    arguments: Mapping[str, Sequence[Any]]
    gather: Callable[[torch.Tensor], torch.Tensor]
    is_main: bool = True
    teacher_images: Dataset[torch.Tensor] | None = None
    reference: FeatureStatistics | None = None
    reference_features: torch.Tensor | None = None
    extractor: FeatureExtractor | None = None
    clip: ClipScorer | None = None
    latency: float | None = None
    batch_size: int = 64
    cost_batch_size: int = 1

    @cached_property
    def features(self) -> torch.Tensor:
        """Features of all samples `(N, D)`."""
        assert self.extractor is not None
        return self.gather(self.extractor.features(self.images, self.batch_size))


@dataclass(frozen=True)
class Metric:
    """How to measure something.

    Attributes:
        measure: Values by column name.
        columns: The columns to show; further values are kept in the JSON alone.
        needs: What it takes, of `"images"`, `"reference"` (statistics), `"reference images"`, `"teacher"`,
            `"prompts"`, `"inputs"` (example inputs of the denoiser) and `"memory"` (a device that counts it).
    """

    measure: Callable[[Subject], Mapping[str, float | None]]
    columns: Mapping[str, Column]
    needs: tuple[str, ...]


def choose_metrics(names: Sequence[str] | None, missing: Mapping[str, str]) -> list[str]:
    """Metrics by name, or all that can be had.

    Args:
        names: Names in `METRICS`, or None for every one that needs nothing that is missing.
        missing: Needs that cannot be met, each with the reason.

    Raises:
        ValueError: If a metric does not exist, or needs what is missing.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if not any(need in missing for need in metric.needs)]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric is {name!r}; it must be one of {', '.join(METRICS)}")
        for need in METRICS[name].needs:
            if need in missing:
                raise ValueError(f"the metric {name!r} cannot be measured: {missing[need]}")
    return list(dict.fromkeys(names))


def macs(subject: Subject) -> dict[str, float | None]:
    """Multiply-accumulate operations of one forward, for one image."""
    return {"macs": count_macs(subject.denoiser)}


def latency(subject: Subject) -> dict[str, float | None]:
    """Seconds per forward."""
    return {"latency": subject.latency}


def memory(subject: Subject) -> dict[str, float | None]:
    """Bytes at the peak of a forward."""
    inputs = example_inputs(subject.denoiser, subject.cost_batch_size)
    return {"memory": measure_peak_memory(subject.denoiser, inputs)}


def fid(subject: Subject) -> dict[str, float | None]:
    """Fréchet distance to the reference images."""
    assert subject.reference is not None
    features = subject.features
    return {"fid": frechet_distance(features, subject.reference)} if subject.is_main else {}


def kid(subject: Subject) -> dict[str, float | None]:
    """Kernel distance to the reference images."""
    assert subject.reference_features is not None
    features = subject.features
    if not subject.is_main:
        return {}
    mean, deviation = kernel_distance(features, subject.reference_features)
    return {"kid": mean, "kid_std": deviation}


def clip_score(subject: Subject) -> dict[str, float | None]:
    """Mean cosine of images and their prompts."""
    assert subject.clip is not None
    scores = subject.clip.scores(subject.images, subject.arguments["prompt"], subject.batch_size)
    return {"clip_score": subject.gather(scores).double().mean().item()}


def psnr(subject: Subject) -> dict[str, float | None]:
    """Mean PSNR with the teacher's images."""
    return {"psnr": _mean_over_pairs(subject, consistency.psnr)}


def ssim(subject: Subject) -> dict[str, float | None]:
    """Mean SSIM with the teacher's images."""
    return {"ssim": _mean_over_pairs(subject, consistency.ssim)}


def _mean_over_pairs(subject: Subject, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float | None:
    """Mean of what compares the samples with the teacher's."""
    if subject.teacher_images is None:
        return None
    batches = [DataLoader(images, subject.batch_size) for images in (subject.images, subject.teacher_images)]
    values = [compare(ours, theirs) for ours, theirs in zip(*batches, strict=True)]
    return subject.gather(torch.cat([torch.empty(0), *values])).mean().item()


# A new metric is one file and one line here.
METRICS: dict[str, Metric] = {
    "macs": Metric(macs, {"macs": Column("MACs", "count", better="lower")}, needs=("inputs",)),
    "latency": Metric(latency, {"latency": Column("latency", "seconds", better="lower")}, needs=("inputs",)),
    "memory": Metric(memory, {"memory": Column("memory", "bytes", better="lower")}, needs=("inputs", "memory")),
    "fid": Metric(fid, {"fid": Column("FID", better="lower", plotted=True)}, needs=("images", "reference")),
    "kid": Metric(
        kid,
        {"kid": Column("KID", digits=4, better="lower", spread="kid_std")},
        needs=("images", "reference", "reference images"),
    ),
    "clip_score": Metric(
        clip_score,
        {"clip_score": Column("CLIP score", digits=4, better="higher", plotted=True)},
        needs=("images", "prompts"),
    ),
    "psnr": Metric(psnr, {"psnr": Column("PSNR, dB", digits=1, better="higher")}, needs=("images", "teacher")),
    "ssim": Metric(ssim, {"ssim": Column("SSIM", digits=3, better="higher")}, needs=("images", "teacher")),
}

"""The metrics, and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ofadiff.cost import count_macs, example_inputs
from ofadiff.evaluation import consistency
from ofadiff.evaluation.clip_score import ClipScorer
from ofadiff.evaluation.extractors import FeatureExtractor
from ofadiff.evaluation.fid import frechet_distance
from ofadiff.evaluation.kid import kernel_distance
from ofadiff.evaluation.measure import measure_latency, measure_peak_memory
from ofadiff.evaluation.report import Column


@dataclass(frozen=True)
class Subject:
    """A model under evaluation; a metric finds here what it said that it needs.

    Attributes:
        denoiser: Stand-alone: an extracted model, or the teacher.
        images: Its samples, uint8 `(N, 3, H, W)`.
        arguments: What the samples were asked for with, a sequence of N values per name (labels, prompts).
        teacher_images: The teacher's samples from the same seeds; None for the teacher itself.
        reference: Features of the reference images `(M, D)`.
        extractor: What extracts them.
        clip: What scores images against prompts.
        batch_size: Images per forward when features are extracted.
        cost_batch_size: Images of the forward whose latency and memory are measured.
    """

    denoiser: nn.Module
    images: torch.Tensor
    arguments: Mapping[str, Sequence[Any]]
    teacher_images: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    extractor: FeatureExtractor | None = None
    clip: ClipScorer | None = None
    batch_size: int = 64
    cost_batch_size: int = 1

    @cached_property
    def features(self) -> torch.Tensor:
        """Features of the images `(N, D)`."""
        assert self.extractor is not None
        return self.extractor.features(self.images, self.batch_size)


@dataclass(frozen=True)
class Metric:
    """How to measure something.

    Attributes:
        measure: Values by column name.
        columns: The columns to show; further values are kept in the JSON alone.
        needs: Of `"images"`, `"reference"`, `"teacher"`, `"prompts"` and `"inputs"` (example inputs of the denoiser),
            what it takes.
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
    inputs = example_inputs(subject.denoiser, subject.cost_batch_size)
    return {"latency": measure_latency(subject.denoiser, inputs)}


def memory(subject: Subject) -> dict[str, float | None]:
    """Bytes at the peak of a forward."""
    inputs = example_inputs(subject.denoiser, subject.cost_batch_size)
    return {"memory": measure_peak_memory(subject.denoiser, inputs)}


def fid(subject: Subject) -> dict[str, float | None]:
    """Fréchet distance to the reference images."""
    assert subject.reference is not None
    return {"fid": frechet_distance(subject.features, subject.reference)}


def kid(subject: Subject) -> dict[str, float | None]:
    """Kernel distance to the reference images."""
    assert subject.reference is not None
    mean, deviation = kernel_distance(subject.features, subject.reference)
    return {"kid": mean, "kid_std": deviation}


def clip_score(subject: Subject) -> dict[str, float | None]:
    """Mean cosine of images and their prompts."""
    assert subject.clip is not None
    return {"clip_score": subject.clip.score(subject.images, subject.arguments["prompt"], subject.batch_size)}


def psnr(subject: Subject) -> dict[str, float | None]:
    """Mean PSNR with the teacher's images."""
    teacher = subject.teacher_images
    return {"psnr": None if teacher is None else consistency.psnr(subject.images, teacher)}


def ssim(subject: Subject) -> dict[str, float | None]:
    """Mean SSIM with the teacher's images."""
    teacher = subject.teacher_images
    return {"ssim": None if teacher is None else consistency.ssim(subject.images, teacher)}


# A new metric is one file and one line here.
METRICS: dict[str, Metric] = {
    "macs": Metric(macs, {"macs": Column("MACs", "count", better="lower")}, needs=("inputs",)),
    "latency": Metric(latency, {"latency": Column("latency", "seconds", better="lower")}, needs=("inputs",)),
    "memory": Metric(memory, {"memory": Column("memory", "bytes", better="lower")}, needs=("inputs",)),
    "fid": Metric(fid, {"fid": Column("FID", better="lower", plotted=True)}, needs=("images", "reference")),
    "kid": Metric(
        kid, {"kid": Column("KID", digits=4, better="lower", spread="kid_std")}, needs=("images", "reference")
    ),
    "clip_score": Metric(
        clip_score,
        {"clip_score": Column("CLIP score", digits=4, better="higher", plotted=True)},
        needs=("images", "prompts"),
    ),
    "psnr": Metric(psnr, {"psnr": Column("PSNR, dB", digits=1, better="higher")}, needs=("images", "teacher")),
    "ssim": Metric(ssim, {"ssim": Column("SSIM", digits=3, better="higher")}, needs=("images", "teacher")),
}

"""What a metric is, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ofadiff.evaluation.called import Frames
from ofadiff.evaluation.metrics.clip_scorer import ClipScorer
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.report.rows import Column
from ofadiff.recordings.folder import Recordings


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
        frames: F: images side by side in each sample of a video.
        recordings: What was recorded of the original's denoiser.
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
    frames: int = 1
    recordings: Recordings | None = None

    @property
    def pictures(self) -> Dataset[torch.Tensor]:
        """This process' n samples, or their n·F frames, each uint8 `(3, H, W)`."""
        return Frames(self.images, self.frames)

    @cached_property
    def features(self) -> torch.Tensor:
        """Features of all samples `(N, D)`, of videos of all frames `(N·F, D)`."""
        assert self.extractor is not None
        features = self.extractor.features(self.pictures, self.batch_size)
        by_sample = features.unflatten(0, (-1, self.frames)) if len(features) else features
        return self.gather(by_sample).flatten(0, 1)

    def mean_of(self, values: torch.Tensor) -> float:
        """Mean over all samples of what each of this process' pictures has, `(n·F,)`."""
        return self.gather(values.view(-1, self.frames).mean(dim=1)).double().mean().item()


@dataclass(frozen=True)
class Metric:
    """How to measure something.

    Attributes:
        measure: Values by column name.
        columns: The columns to show; further values are kept in the JSON alone.
        needs: What it takes, of `"images"`, `"reference"` (statistics), `"reference images"`, `"teacher"`,
            `"prompts"`, `"inputs"` (example inputs of the denoiser), `"recordings"` and `"memory"` (a device that
            counts it).
    """

    measure: Callable[[Subject], Mapping[str, float | None]]
    columns: Mapping[str, Column]
    needs: tuple[str, ...]

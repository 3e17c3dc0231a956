"""What a metric is, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from ofadiff.evaluation.called import Frames
from ofadiff.evaluation.metrics.clip_scorer import ClipScorer
from ofadiff.evaluation.metrics.extractors import FeatureExtractor, is_dinov2
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.report.rows import Column
from ofadiff.recordings.folder import Recordings

T = TypeVar("T")


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
        other_images: As many samples again from each of several other first seeds, for FID alone.
        prc_neighborhood: k of precision and recall.
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
    other_images: Sequence[Dataset[torch.Tensor]] = ()
    prc_neighborhood: int = 3
    _found: dict[Callable[[Subject], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def pictures(self) -> Dataset[torch.Tensor]:
        """This process' n samples, or their n·F frames, each uint8 `(3, H, W)`."""
        return Frames(self.images, self.frames)

    @cached_property
    def features(self) -> torch.Tensor:
        """Features of all samples `(N, D)`, of videos of all frames `(N·F, D)`."""
        return self._features_of(self.images)

    def feature_sets(self) -> Iterator[torch.Tensor]:
        """`features`, then those of the samples from each of the other seeds."""
        yield self.features
        for images in self.other_images:
            yield self._features_of(images)

    def once(self, measure: Callable[[Subject], T]) -> T:
        """What a function makes of this subject; several metrics may ask for it, and it is called once."""
        if measure not in self._found:
            self._found[measure] = measure(self)
        return self._found[measure]

    def _features_of(self, images: Dataset[torch.Tensor]) -> torch.Tensor:
        assert self.extractor is not None
        features = self.extractor.features(Frames(images, self.frames), self.batch_size)
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
        over_dinov2: Titles of columns over DINOv2's features, where papers have other ones.
    """

    measure: Callable[[Subject], Mapping[str, float | None]]
    columns: Mapping[str, Column]
    needs: tuple[str, ...]
    over_dinov2: Mapping[str, str] = field(default_factory=dict)

    def columns_over(self, extractor: str | None) -> dict[str, Column]:
        """The columns as they are called over the features of an extractor, by torch-fidelity's name."""
        titles = self.over_dinov2 if is_dinov2(extractor) else {}
        return {name: replace(each, title=titles.get(name, each.title)) for name, each in self.columns.items()}

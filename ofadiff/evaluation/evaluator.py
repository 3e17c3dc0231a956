"""One report over every size of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.data import Dataset, Subset

from ofadiff.data.images import Images
from ofadiff.evaluation.candidates import Candidate, check_pipelines, list_candidates
from ofadiff.evaluation.metrics import METRICS, Subject, choose_metrics
from ofadiff.evaluation.metrics.costs import cost_inputs
from ofadiff.evaluation.preparation import (
    Instruments,
    Store,
    budget_of,
    denoisers_of,
    make_instruments,
    missing_needs,
    missing_reference,
    open_stores,
    read_statistics,
    sampling_of,
    shape_in_words,
    try_all,
)
from ofadiff.evaluation.report import Column, Report, Row
from ofadiff.evaluation.report.rows import MISSED_NOTE, PARAMETERS, REACHED, TEACHER
from ofadiff.evaluation.report_protocol import Made, report_protocol
from ofadiff.evaluation.sampling import Sampling, draw_share, evaluation_mode
from ofadiff.evaluation.settings import EvaluationSettings
from ofadiff.evaluation.share import Processes, Share, check_accelerator
from ofadiff.profiling.cost import count_parameters
from ofadiff.profiling.timing import measure_latencies
from ofadiff.reading.arguments import check_argument, check_list
from ofadiff.storage.finite import NotFiniteError


def evaluate(
    pipeline: DiffusionPipeline,
    *,
    reference: str | Path | Images | torch.Tensor | None = None,
    teacher: DiffusionPipeline | None = None,
    compare: Mapping[str, DiffusionPipeline] | None = None,
    sizes: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    accelerator: Accelerator | None = None,
    settings: EvaluationSettings | None = None,
    **changes: Any,
) -> Report:
    """Measures every size of a pipeline, and its teacher, from the same seeds.

    What is measured is the extracted model of each size: what ships. Of several processes each samples its share of the
    images; the report is the same as that of one, and every process gets it.

    Args:
        pipeline: An `OFAPipeline`, or any other pipeline for a report of one row.
        reference: Real images for FID, KID, MIND, precision and recall: a folder, `Images`, or uint8 `(N, 3, H, W)`.
            For FID alone also a file of their statistics, see `FeatureStatistics.load`.
        teacher: Pipeline of the original model, with the same scheduler.
        compare: More pipelines by name, with the same scheduler: other sets of sizes, or plain ones.
        sizes: Which sizes, all by default.
        metrics: Names in `METRICS`; by default all that can be had from what is given.
        accelerator: Accelerator of a script that runs in several processes; the pipelines are on its device.
        settings: How to sample and measure.
        **changes: Fields of the settings, such as `num_samples`.

    Returns:
        The report, the teacher first, then the sizes from the largest down, then the variants, then what they are
        compared with.

    Raises:
        ImportError: If torch-fidelity, scikit-image or transformers is needed and not installed.
        TypeError: If there is no such setting.
        ValueError: Before sampling, but for a trial image of each model: if a metric, size or extractor does not exist,
            a metric lacks what it needs, there are too few images for it, FID is wanted over several seeds and not
            measured, weights of the extractor cannot be had, a pipeline lacks prompts or takes no such argument, a
            scheduler differs from the others or ignores seeds, the reference or the CLIP model cannot be read or used,
            or `samples_dir` holds other images.
        NotFiniteError: If a model gives values that are not finite: names the size, the step and the sample.

    Example:
        >>> pipeline = OFAPipeline.from_pretrained("ofa")
        >>> report = evaluate(pipeline, metrics=["macs"], num_inference_steps=2, progress=False)
        >>> [row.label for row in report.rows]
        ['1.0', '0.5']
        >>> report.write("report")
    """
    given = EvaluationSettings() if settings is None else settings
    check_argument("settings", given, isinstance(given, EvaluationSettings), "EvaluationSettings, or None")
    settings = replace(given, **changes)
    check_pipelines(pipeline, teacher, compare)
    check_list("sizes", sizes, "sizes of the pipeline")
    check_list("metrics", metrics, "names of metrics")
    check_accelerator(accelerator)
    processes = Processes(accelerator)
    statistics = read_statistics(reference)
    candidates = list_candidates(pipeline, teacher, compare or {}, sizes, settings.variants)
    missing = missing_reference(reference is not None, statistics) | missing_needs(candidates, settings)
    names = choose_metrics(metrics, missing)
    sampling = sampling_of(pipeline, settings)
    for candidate in candidates if "images" not in missing else ():
        sampling.check(candidate.source)
    instruments = make_instruments(pipeline.device, reference, statistics, names, settings, processes)
    budget = budget_of(pipeline, teacher, settings.recordings)
    evaluation = _Evaluation(
        candidates, names, sampling, settings, processes, instruments, budget, sampled="images" not in missing
    )
    stores = evaluation.begin()
    latencies = evaluation.measure_latencies()
    report = Report(settings.title, evaluation.columns())
    for candidate in candidates:
        evaluation.measure(candidate, stores.pop(candidate.name, [{}]), latencies.get(candidate.name), report)
    made = Made(names, evaluation.count, evaluation.resolution, processes.count)
    report.protocol = report_protocol(pipeline, sampling, settings, instruments, made, reference)
    if any(map(report.missed, report.rows)):
        report.protocol["sizes"] = MISSED_NOTE
    return report


@dataclass
class _Evaluation:
    """An evaluation on its way, from the trial images to the last row."""

    candidates: Sequence[Candidate]
    names: Sequence[str]
    sampling: Sampling
    settings: EvaluationSettings
    processes: Processes
    instruments: Instruments
    budget: tuple[Callable[[nn.Module], int], int] | None
    sampled: bool = True
    resolution: str = ""
    frames: int = 1
    teacher_images: Dataset[torch.Tensor] | None = None

    @property
    def count(self) -> int:
        """Images of each model."""
        return self.instruments.count if self.sampled else 0

    @property
    def samplings(self) -> list[Sampling]:
        """How each set of samples is drawn: the first one, and for FID over several seeds as many again from each."""
        seeds = [self.sampling.seed + number * self.count for number in range(self.settings.fid_seeds)]
        return [replace(self.sampling, seed=seed) for seed in seeds]

    def columns(self) -> dict[str, Column]:
        """What the report shows."""
        extractor = None if self.instruments.features is None else self.instruments.features.name
        columns = {} if self.budget is None else {"reached": REACHED}
        columns["params"] = PARAMETERS
        for name in self.names:
            columns.update(METRICS[name].columns_over(extractor))
        return columns

    def begin(self) -> dict[str, list[Store]]:
        """Tries every model and instrument once, and says where the images of each model go."""
        if not self.sampled:
            return {}
        settings, instruments = self.settings, self.instruments
        trials = try_all(self.candidates, self.sampling)
        height, width = trials[0].shape[-2:]
        self.resolution, self.frames = shape_in_words(trials[0]), trials[0].shape[1]
        instruments.try_on(trials[0].flatten(0, 1), self.names, self.sampling, self.resolution)
        where = settings.samples_dir, settings.overwrite_samples
        stores = open_stores(self.candidates, self.samplings, self.resolution, *where, self.processes)
        instruments.read_reference(height, width, settings, self.processes)
        return stores

    def measure_latencies(self) -> dict[str, float]:
        """Seconds of a forward of every model, if they are asked for; one process measures alone."""
        if "latency" not in self.names:
            return {}
        self.processes.wait()
        latencies: dict[str, float] = {}
        if self.processes.is_main:
            inputs = partial(cost_inputs, batch_size=self.settings.cost_batch_size, recordings=self.settings.recordings)
            latencies = measure_latencies(lambda: denoisers_of(self.candidates), inputs)
        self.processes.wait()
        return latencies

    def measure(
        self,
        candidate: Candidate,
        stores: Sequence[Store],
        latency: float | None,
        report: Report,
    ) -> None:
        """Samples one model, measures it, and adds its row to the report."""
        settings, processes, instruments = self.settings, self.processes, self.instruments
        row, stand_alone = candidate.row, candidate.load()
        share, show = Share(self.count, settings.batch_size, processes), settings.progress and processes.is_main
        if self.sampled:
            for number, (sampling, store) in enumerate(zip(self.samplings, stores, strict=True)):
                what = f"Sampling {candidate.name}" + (f" from seed {sampling.seed}" if number else "")
                draw_share(stand_alone, sampling, share, store, show, what, candidate.added, row.name)
        images, *others = (Subset(store, share.indices) for store in stores)  # type: ignore[arg-type]
        denoiser = stand_alone.components[candidate.component]
        subject = Subject(
            denoiser=denoiser,
            images=images,
            arguments=self.sampling.condition(share.indices),
            gather=share.gather,
            is_main=processes.is_main,
            teacher_images=self.teacher_images,
            reference=instruments.statistics,
            reference_features=instruments.reference_features,
            extractor=instruments.features,
            clip=instruments.clip,
            latency=latency,
            batch_size=settings.batch_size,
            cost_batch_size=settings.cost_batch_size,
            frames=self.frames,
            recordings=settings.recordings,
            other_images=others,
            prc_neighborhood=settings.prc_neighborhood,
        )
        row.values["params"] = count_parameters(denoiser)
        row.values.update({} if self.budget is None else {"reached": None})
        if self.budget is not None and not candidate.added:
            spent, full = self.budget
            row.values["reached"] = spent(denoiser) / full
        with evaluation_mode(stand_alone):
            for name in self.names:
                if candidate.added and "images" not in METRICS[name].needs:
                    row.values.update(dict.fromkeys(METRICS[name].columns))
                    continue
                if "images" in METRICS[name].needs or processes.is_main:
                    row.values.update(METRICS[name].measure(subject))
        row.values = processes.broadcast(row.values)
        _check_finite(row)
        shown = processes.gather([(index, stores[0][index]) for index in share.indices if index < settings.num_shown])
        pictures = [image for _, image in sorted(shown, key=_first)]
        report.add_row(row, torch.stack(pictures) if pictures else None)
        if row.series == TEACHER:
            self.teacher_images = images


def _check_finite(row: Row) -> None:
    for name, value in row.values.items():
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(
                f"{name} of {row.name} ({row.series}) is {value}; no report is made of what means nothing"
            )


def _first(pair: tuple[int, torch.Tensor]) -> int:
    return pair[0]

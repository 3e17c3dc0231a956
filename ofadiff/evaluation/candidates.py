"""What an evaluation compares: the teacher, every size, and other pipelines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.evaluation.report.rows import JOINT, TEACHER, VARIANTS, Row
from ofadiff.pipelines import OFAPipeline
from ofadiff.reading.arguments import check_argument, check_dict


@dataclass(frozen=True)
class Candidate:
    """A row to fill.

    Attributes:
        row: The row.
        source: The pipeline that its model comes from.
        component: What that calls its denoiser.
        added: What a call takes that others do not.
    """

    row: Row
    source: DiffusionPipeline
    component: str
    added: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name of its own, see `Row.key`."""
        return self.row.key

    def load(self) -> DiffusionPipeline:
        """The stand-alone pipeline: of a size, around the extracted model."""
        return self.source if self.row.size is None else self.source.extract(self.row.size)


def check_pipelines(pipeline: Any, teacher: Any, compare: Any) -> None:
    """Raises ValueError if one of them is no pipeline."""
    check_dict("compare", compare)
    others = {f"compare[{name!r}]": other for name, other in (compare or {}).items()}
    for name, each in {"pipeline": pipeline, **({} if teacher is None else {"teacher": teacher}), **others}.items():
        check_argument(name, each, isinstance(each, DiffusionPipeline), "a pipeline of diffusers")


def list_candidates(
    pipeline: DiffusionPipeline,
    teacher: DiffusionPipeline | None,
    compare: Mapping[str, DiffusionPipeline],
    sizes: Sequence[float] | None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Candidate]:
    """The teacher, the sizes from the largest down, the variants, then the sizes of every other pipeline.

    Raises:
        ValueError: If a pipeline has no such size or no denoiser, samples with another scheduler, or has a name that
            cannot be one.
    """
    component = _component_of(pipeline)
    candidates = [] if teacher is None else [Candidate(Row(TEACHER, TEACHER), teacher, component)]
    for size in _choose_sizes(pipeline, sizes):
        candidates.append(Candidate(_row(JOINT, size), pipeline, component))
    for name, added in (variants or {}).items():
        if not isinstance(pipeline, OFAPipeline) or pipeline.supernet is None:
            raise ValueError(f"variants has {name!r}, but the pipeline has no sizes to call it with")
        if not re.fullmatch(r"\w[\w .-]*", name):
            raise ValueError(f"{name!r} cannot be the name of a variant; take letters, digits, spaces and ._-")
        candidates.append(Candidate(Row(name, VARIANTS), pipeline, component, {"size": pipeline.size, **added}))
    for name, other in compare.items():
        if name in (JOINT, TEACHER, VARIANTS) or not re.fullmatch(r"\w[\w .-]*", name):
            raise ValueError(
                f"{name!r} cannot be the name of a pipeline to compare with; take letters, digits, spaces and ._-, but "
                f"not {JOINT!r}, {TEACHER!r} or {VARIANTS!r}"
            )
        own_sizes = sizes if isinstance(other, OFAPipeline) else None
        candidates += [Candidate(_row(name, size), other, component) for size in _choose_sizes(other, own_sizes)]
    for candidate in candidates:
        if not isinstance(candidate.source.components.get(component), nn.Module):
            raise ValueError(f"the {type(candidate.source).__name__} of {candidate.name} has no {component} to measure")
        _check_schedulers(candidate, pipeline)
    return candidates


def _component_of(pipeline: DiffusionPipeline) -> str:
    """What a pipeline calls the denoiser that is measured: the first that has sizes, or its only one."""
    if isinstance(pipeline, OFAPipeline):
        return pipeline.denoiser_names[0]
    denoiser = denoiser_of(pipeline)
    return next(name for name, part in pipeline.components.items() if part is denoiser)


def _row(series: str, size: float | None) -> Row:
    return Row("model", series) if size is None else Row(str(size), series, size)


def _choose_sizes(pipeline: DiffusionPipeline, sizes: Sequence[float] | None) -> list[Any]:
    """Sizes from the largest down; None, the model as it is, of a pipeline that has no sizes."""
    if not isinstance(pipeline, OFAPipeline):
        if sizes:
            raise ValueError(f"sizes are {list(sizes)}, but this {type(pipeline).__name__} is no OFAPipeline")
        return [None]
    chosen = pipeline.sizes if sizes is None else [pipeline.subnets.find(size).size for size in sizes]
    if not chosen:
        raise ValueError(f"sizes is empty; choose some of {', '.join(f'{size:g}' for size in pipeline.sizes)}")
    return sorted(set(chosen), reverse=True)


def _check_schedulers(candidate: Candidate, pipeline: DiffusionPipeline) -> None:
    """Images are compared seed by seed, so the samplers have to be the same."""
    ours, theirs = (each.components.get("scheduler") for each in (pipeline, candidate.source))
    if ours is None or theirs is None:
        return
    configs = [{k: v for k, v in each.config.items() if not k.startswith("_")} for each in (ours, theirs)]
    if type(ours) is not type(theirs) or configs[0] != configs[1]:
        who = TEACHER if candidate.row.series == TEACHER else repr(candidate.row.series)
        raise ValueError(
            f"the {who} samples with {type(theirs).__name__}, the pipeline with {type(ours).__name__}, or with other "
            "settings; give both the same scheduler"
        )

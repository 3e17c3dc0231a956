"""What a picture costs: the denoiser's parameters, MACs and weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ofadiff.pipelines import OFAPipeline
from ofadiff.profiling.cost import count_parameters
from ofadiff.supernet_model import unwrapped


@dataclass(frozen=True)
class Costs:
    """Of the denoiser, or of all denoisers of a pipeline together.

    Attributes:
        params: Parameters; over a schedule those of its largest size.
        params_share: Of those of the checkpoint's full denoiser.
        macs_share: MACs, of those of the checkpoint's full denoiser; over a schedule their mean. None if not counted.
        weight_bytes: What the weights take.
    """

    params: int
    params_share: float
    macs_share: float | None
    weight_bytes: int


def costs_at(pipeline: OFAPipeline, size: float) -> Costs:
    """Costs of one of a pipeline's sizes."""
    tables = [supernet.subnets for supernet in pipeline.supernets.values()]
    subnets = [table.find(size) for table in tables]
    params = sum(subnet.params for subnet in subnets)
    macs, full_macs = [subnet.macs for subnet in subnets], [table.full_macs for table in tables]
    counted = None not in macs and None not in full_macs
    return Costs(
        params=params,
        params_share=params / sum(table.full_params for table in tables),
        macs_share=sum(macs) / sum(full_macs) if counted else None,  # type: ignore[arg-type]
        weight_bytes=sum(
            subnet.params * supernet.model.dtype.itemsize
            for subnet, supernet in zip(subnets, pipeline.supernets.values(), strict=True)
        ),
    )


def costs_over(pipeline: OFAPipeline, sizes: Sequence[float]) -> Costs:
    """Costs of forwards at sizes, one after the other."""
    steps = [costs_at(pipeline, size) for size in sizes]
    macs = [step.macs_share for step in steps if step.macs_share is not None]
    largest = max(steps, key=lambda step: step.params)
    mean = statistics.fmean(macs) if len(macs) == len(steps) else None
    return Costs(largest.params, largest.params_share, mean, largest.weight_bytes)


def costs_of_original(original: Any, pipeline: OFAPipeline) -> Costs:
    """Costs of another pipeline's denoisers; their MACs are the checkpoint's where they are as large as its own."""
    models = [unwrapped(original.components[name]) for name in pipeline.denoiser_names]
    full_params = sum(supernet.subnets.full_params for supernet in pipeline.supernets.values())
    params = sum(map(count_parameters, models))
    return Costs(
        params=params,
        params_share=params / full_params,
        macs_share=1.0 if params == full_params else None,
        weight_bytes=sum(count_parameters(model) * model.dtype.itemsize for model in models),
    )

"""What a forward costs: MACs, latency and peak memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.inputs import example_inputs, forward_inputs
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column
from ofadiff.profiling.cost import count_macs
from ofadiff.profiling.memory import measure_peak_memory
from ofadiff.recordings.folder import Recordings


def cost_inputs(model: nn.Module, batch_size: int, recordings: Recordings | None) -> dict[str, Any]:
    """The forward that is timed: example inputs of so many images, or the first recorded call as it was."""
    return example_inputs(model, batch_size) if recordings is None else forward_inputs(model, recordings)


def macs(subject: Subject) -> dict[str, float | None]:
    """Multiply-accumulate operations of one forward, for one image."""
    return {"macs": count_macs(subject.denoiser, subject.recordings)}


def latency(subject: Subject) -> dict[str, float | None]:
    """Seconds per forward."""
    return {"latency": subject.latency}


def memory(subject: Subject) -> dict[str, float | None]:
    """Bytes at the peak of a forward."""
    inputs = cost_inputs(subject.denoiser, subject.cost_batch_size, subject.recordings)
    return {"memory": measure_peak_memory(subject.denoiser, inputs)}


MACS = Metric(macs, {"macs": Column("MACs", "count", better="lower")}, needs=("inputs",))
LATENCY = Metric(latency, {"latency": Column("latency", "seconds", better="lower")}, needs=("inputs",))
MEMORY = Metric(memory, {"memory": Column("memory", "bytes", better="lower")}, needs=("inputs", "memory"))

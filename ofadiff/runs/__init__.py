"""Runs: from what a user asks for to the files that come out, around the joint training."""

from ofadiff.runs.correction import correct
from ofadiff.runs.healing import make_single_size, save_healed, start_healing
from ofadiff.runs.joint import train_jointly
from ofadiff.runs.recorded import start_recorded
from ofadiff.runs.result import save
from ofadiff.runs.run import Run, start
from ofadiff.runs.settings import (
    Calls,
    Captions,
    Classes,
    Compression,
    Data,
    Losses,
    Model,
    OneSize,
    Optimization,
    Output,
    RunSettings,
    Watching,
)
from ofadiff.runs.sizes import choose_sizes, measure_latency, provenance, resumed_supernet, score, show_sizes
from ofadiff.training.bundles import TrainingResult

__all__ = [
    "Calls",
    "Captions",
    "Classes",
    "Compression",
    "Data",
    "Losses",
    "Model",
    "OneSize",
    "Optimization",
    "Output",
    "Run",
    "RunSettings",
    "TrainingResult",
    "Watching",
    "choose_sizes",
    "correct",
    "make_single_size",
    "measure_latency",
    "provenance",
    "resumed_supernet",
    "save",
    "save_healed",
    "score",
    "show_sizes",
    "start",
    "start_healing",
    "start_recorded",
    "train_jointly",
]

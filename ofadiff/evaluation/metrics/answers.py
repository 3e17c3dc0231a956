"""How far a denoiser's answers are from those that were recorded of the original."""

from __future__ import annotations

import torch

from ofadiff.denoisers.prepare import prepare_recorded
from ofadiff.denoisers.recorded import answered_channels
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column
from ofadiff.training.losses import mean_squared_error, predict

# Recorded calls that are answered again, evenly out of all.
ANSWERED = 64


@torch.no_grad()
def answer_error(subject: Subject) -> dict[str, float | None]:
    """Squared distance of answers to recorded calls over the squared length of those; 0 for the original."""
    recordings = subject.recordings
    assert recordings is not None
    model = subject.denoiser
    device = next(model.parameters()).device
    chosen = range(0, len(recordings), -(-len(recordings) // ANSWERED))
    sums = torch.zeros(2, dtype=torch.float64)
    for index in chosen:
        call = recordings[index].to(device)
        (inputs,) = prepare_recorded({"parts": [call]}, answered_channels(model.config))  # type: ignore[arg-type]
        prediction = predict(model, inputs)[:, : inputs.target.shape[1]]
        distance = mean_squared_error(prediction, inputs.target).sum()
        length = mean_squared_error(torch.zeros_like(inputs.target), inputs.target).sum()
        sums += torch.stack([distance, length]).double().cpu()
    return {"answer_error": (sums[0] / sums[1]).item()}


ANSWER_ERROR = Metric(
    answer_error, {"answer_error": Column("answer error", digits=4, better="lower")}, needs=("recordings",)
)

"""Example inputs: what one forward of a denoiser takes, to count and time it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ofadiff.denoisers.table import DENOISERS, kind_of_model
from ofadiff.denoisers.zeros import NoInputsError, Zeros
from ofadiff.reading.arguments import check_argument
from ofadiff.recordings.folder import Recordings
from ofadiff.recordings.recorded_call import RecordedCall, RecordedKeywords, in_dtype

# What stands for one forward: keyword arguments, or what was recorded of the model.
Inputs = Mapping[str, Any] | RecordedCall | Recordings


def example_inputs(
    model: nn.Module, batch_size: int = 1, recordings: Recordings | RecordedCall | None = None
) -> dict[str, Any]:
    """Keyword arguments for one forward at the sample size of the model's config, on its device, in its dtype.

    Transformers whose config names no size get the latents of a 1024-pixel image, or of a 5-second video.

    Args:
        model: The denoiser.
        batch_size: Samples of the forward.
        recordings: What was recorded of the model: of a class that nothing else is known of, its first call is taken as
            it was made, with the batch that it had.

    Raises:
        ValueError: If the model's class is none that inputs are known for, or its config has no sample size, and there
            are no recordings.
    """
    kind = kind_of_model(model)
    if kind is not None:
        return kind.example_inputs(model, Zeros(model, batch_size))
    if recordings is None:
        accepted = ", ".join(dict.fromkeys(known.model for known in DENOISERS.values()))
        raise NoInputsError(
            f"no example inputs are known for {type(model).__name__}, only for {accepted}; pass inputs, or recordings"
        )
    return recorded_inputs(model, recordings)


def recorded_inputs(model: nn.Module, recordings: Recordings | RecordedCall) -> RecordedKeywords:
    """Keyword arguments of a recorded call, the first one of several, on a model's device, in its dtype."""
    call = recordings[0] if isinstance(recordings, Recordings) else recordings
    parameter = next(model.parameters())
    arguments = call.to(parameter.device).arguments
    return RecordedKeywords(in_dtype(arguments, parameter.dtype, call.time, call.dtype), call.rows)


def forward_inputs(model: nn.Module, inputs: Inputs | None = None) -> dict[str, Any]:
    """Keyword arguments of one forward: those given, those of a recording, or by default `example_inputs(model)`.

    Raises:
        ValueError: If they are something else.
    """
    if inputs is None:
        return example_inputs(model)
    if isinstance(inputs, Recordings | RecordedCall):
        return recorded_inputs(model, inputs)
    named = isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs)
    check_argument("inputs", inputs, named, "a dict of keyword arguments of the forward, or recordings")
    return dict(inputs) if not isinstance(inputs, RecordedKeywords) else inputs


def batch_of(inputs: Mapping[str, Any]) -> int:
    """How many samples count as the batch of one forward's inputs: those of a recording; inputs that a user gives are
    one.
    """
    return inputs.rows if isinstance(inputs, RecordedKeywords) else 1

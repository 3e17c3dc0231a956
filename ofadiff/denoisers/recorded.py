"""Any other denoiser: what is known of it is what was recorded of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ofadiff.denoisers.kind import CALLS, Config, DenoiserKind
from ofadiff.denoisers.table import kind_of_model
from ofadiff.denoisers.zeros import NoInputsError, Zeros

RECORDED_DEFAULTS = {"tracker_project_name": "ofadiff-any", "criterion": "sensitivity", "num_validation_images": 0}


def no_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Raises NoInputsError: only recordings say what the model is called with."""
    raise NoInputsError(f"no example inputs are known for {type(model).__name__}; pass recordings of it")


def recorded_kind(denoiser: nn.Module, pipeline: str, component: str) -> DenoiserKind:
    """The kind of a denoiser that is trained on recordings, of whatever class.

    Args:
        denoiser: The denoiser; it may be on the meta device.
        pipeline: Class of its pipeline.
        component: What that calls it.
    """
    known = kind_of_model(denoiser)
    if known is None:
        known = DenoiserKind(type(denoiser).__name__, no_inputs)
    return dataclasses.replace(
        known,
        components={pipeline: component},
        pixels_as=None,
        condition=CALLS,
        arguments=None,
        encode_captions=None,
        classes=None,
        null_class=None,
        training_defaults=RECORDED_DEFAULTS,
    )


def answered_channels(config: Config) -> int | None:
    """How many channels of an answer count: the first half where diffusers' pipelines take the others for a variance.

    None where all do.
    """
    given, put_out = config.get("in_channels"), config.get("out_channels")
    return given if isinstance(given, int) and put_out == 2 * given else None

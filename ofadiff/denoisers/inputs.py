"""Example inputs: what one forward of a denoiser takes, to count and time it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.table import DENOISERS, kind_of_model
from ofadiff.denoisers.zeros import Zeros


def example_inputs(model: nn.Module, batch_size: int = 1) -> dict[str, Any]:
    """Keyword arguments for one forward at the sample size of the model's config, on its device, in its dtype.

    Transformers whose config names no size get the latents of a 1024-pixel image, or of a 5-second video.

    Raises:
        ValueError: If the model's class is none that inputs are known for, or its config has no sample size.
    """
    kind = kind_of_model(model)
    if kind is None:
        accepted = ", ".join(dict.fromkeys(known.model for known in DENOISERS.values()))
        raise ValueError(f"no example inputs are known for {type(model).__name__}, only for {accepted}; pass inputs")
    return kind.example_inputs(model, Zeros(model, batch_size))

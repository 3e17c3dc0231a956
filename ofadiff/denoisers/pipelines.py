"""Which component of a pipeline denoises."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

DENOISERS = ("unet", "transformer")


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The denoiser among a pipeline's components.

    Raises:
        ValueError: If there is none.
    """
    for name in DENOISERS:
        if isinstance(pipeline.components.get(name), nn.Module):
            return pipeline.components[name]
    raise ValueError(
        f"this {type(pipeline).__name__} has no denoiser: none of its components {', '.join(pipeline.components)} is "
        f"{' or '.join(DENOISERS)}"
    )

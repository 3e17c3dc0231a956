"""Which component of a pipeline denoises, and how many classes it knows."""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ofadiff.denoisers.table import component_names, kind_of_model


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The denoiser among a pipeline's components.

    Raises:
        ValueError: If there is none.
    """
    for name in component_names():
        if isinstance(pipeline.components.get(name), nn.Module):
            return pipeline.components[name]
    raise ValueError(
        f"this {type(pipeline).__name__} has no denoiser: none of its components {', '.join(pipeline.components)} is "
        f"{' or '.join(component_names())}"
    )


def class_count(denoiser: nn.Module) -> int | None:
    """How many classes a denoiser is conditioned on; None if it is unconditional, or takes any number."""
    kind = kind_of_model(denoiser)
    known = None if kind is None or kind.classes is None else kind.classes(denoiser)
    return None if known is None or known == math.inf else int(known)

"""Flux.2: squares of latents as tokens, and a language model's embeddings beside them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import Zeros, packed_image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `Flux2Transformer2DModel`."""
    return packed_image_and_text(model, zeros, 4)


FLUX_2 = DenoiserKind("Flux2Transformer2DModel", example_inputs)

"""AuraFlow: joint attention to T5's embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import Zeros, image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of an `AuraFlowTransformer2DModel`."""
    return image_and_text(model, zeros, model.config.joint_attention_dim)


AURAFLOW = DenoiserKind("AuraFlowTransformer2DModel", example_inputs)

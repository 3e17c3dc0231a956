"""Lumina 2: latents and a language model's embeddings in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import Zeros, image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `Lumina2Transformer2DModel`."""
    inputs = image_and_text(model, zeros, model.config.cap_feat_dim)
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2], device=zeros.device, dtype=torch.bool)
    return {**inputs, "encoder_attention_mask": mask}


LUMINA_2 = DenoiserKind("Lumina2Transformer2DModel", example_inputs)

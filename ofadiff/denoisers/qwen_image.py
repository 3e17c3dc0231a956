"""Qwen-Image: squares of latents as tokens, and Qwen's embeddings beside them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import LATENT_SIZE, LONG_TEXT_TOKENS, Zeros, guidance


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `QwenImageTransformer2DModel`."""
    side = LATENT_SIZE // 2
    inputs = {
        "hidden_states": zeros(side * side, model.config.in_channels),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.joint_attention_dim),
        "timestep": zeros(),
        "img_shapes": [[(1, side, side)]] * zeros.batch_size,
    }
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # in diffusers 0.35 nothing else says so
        inputs["txt_seq_lens"] = [LONG_TEXT_TOKENS] * zeros.batch_size
    return inputs | guidance(model, zeros)


QWEN_IMAGE = DenoiserKind("QwenImageTransformer2DModel", example_inputs)

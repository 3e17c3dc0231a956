"""LTX: videos, as a sequence of tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import LATENT_VIDEO, LONG_TEXT_TOKENS, Zeros


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `LTXVideoTransformer3DModel`."""
    frames, height, width = LATENT_VIDEO[0], LATENT_VIDEO[1] // 4, LATENT_VIDEO[2] // 4
    return {
        "hidden_states": zeros(frames * height * width, model.config.in_channels),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.caption_channels),
        "encoder_attention_mask": zeros(LONG_TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


LTX = DenoiserKind("LTXVideoTransformer3DModel", example_inputs)

"""Wan: videos."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import LATENT_VIDEO, LONG_TEXT_TOKENS, Zeros


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `WanTransformer3DModel`."""
    config = model.config
    inputs = {
        "hidden_states": zeros(config.in_channels, *LATENT_VIDEO),
        "timestep": zeros.whole(),
        "encoder_hidden_states": zeros(2 * LONG_TEXT_TOKENS, config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = zeros(LONG_TEXT_TOKENS + 1, config.image_dim)
    return inputs


WAN = DenoiserKind("WanTransformer3DModel", example_inputs)

"""CogVideoX: videos."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import Zeros


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `CogVideoXTransformer3DModel`."""
    config = model.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    inputs = {
        "hidden_states": zeros(frames, config.in_channels, config.sample_height, config.sample_width),
        "timestep": zeros.whole(),
        "encoder_hidden_states": zeros(config.max_text_seq_length, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames * config.sample_height * config.sample_width // config.patch_size**2
        angles = zeros.shared(tokens, config.attention_head_dim)
        inputs["image_rotary_emb"] = (angles, angles)
    return inputs


COGVIDEOX = DenoiserKind("CogVideoXTransformer3DModel", example_inputs)

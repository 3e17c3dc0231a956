"""Stable Diffusion 3 and 3.5: joint attention of latents and the embeddings of two CLIPs and, if it is there, T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ofadiff.denoisers.kind import TEXT_TO_IMAGE_DEFAULTS, Config, DenoiserKind, Text
from ofadiff.denoisers.zeros import LONG_TEXT_TOKENS, TEXT_TOKENS, Zeros, image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of an `SD3Transformer2DModel`."""
    inputs = image_and_text(model, zeros, model.config.joint_attention_dim, TEXT_TOKENS + LONG_TEXT_TOKENS)
    return {**inputs, "pooled_projections": zeros(model.config.pooled_projection_dim)}


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `pooled_projections`, `(N, channels)`."""
    hidden_states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), None, None, device=pipeline.vae.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden_states, "pooled_projections": pooled}


def arguments(config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an `SD3Transformer2DModel`."""
    names = ("encoder_hidden_states", "pooled_projections")
    return {"hidden_states": latents, "timestep": timesteps, **{name: encoded[name] for name in names}}


STABLE_DIFFUSION_3 = DenoiserKind(
    "SD3Transformer2DModel",
    example_inputs,
    components={"StableDiffusion3Pipeline": "transformer"},
    arguments=arguments,
    encode_captions=encode_captions,
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)

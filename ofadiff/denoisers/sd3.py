"""Stable Diffusion 3 and 3.5: joint attention of latents and the embeddings of two CLIPs and, if it is there, T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from ofadiff.denoisers.family import Family, Text


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `pooled_projections`, `(N, channels)`."""
    hidden_states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), None, None, device=pipeline.vae.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden_states, "pooled_projections": pooled}


def arguments(
    config: Mapping[str, Any], latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of an `SD3Transformer2DModel`."""
    names = ("encoder_hidden_states", "pooled_projections")
    return {"hidden_states": latents, "timestep": timesteps, **{name: encoded[name] for name in names}}


STABLE_DIFFUSION_3 = Family(StableDiffusion3Pipeline, "transformer", SD3Transformer2DModel, encode_captions, arguments)

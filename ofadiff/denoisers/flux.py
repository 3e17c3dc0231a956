"""Flux: squares of latents as tokens, each with its place, and T5's embeddings beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.denoisers.kind import TEXT_TO_IMAGE_DEFAULTS, Config, DenoiserKind, Text, pack_latents
from ofadiff.denoisers.zeros import Zeros, packed_image_and_text

PACKING = 2
GUIDANCE_SCALE = 3.5  # what FluxPipeline's call tells the models that are told one, unless it is given another


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `FluxTransformer2DModel`."""
    inputs = packed_image_and_text(model, zeros, axes=3)
    return {**inputs, "pooled_projections": zeros(model.config.pooled_projection_dim)}


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `pooled_projections`, `(N, channels)`."""
    hidden_states, pooled, _ = pipeline.encode_prompt(list(captions), device=pipeline.vae.device)
    return {"encoder_hidden_states": hidden_states, "pooled_projections": pooled}


def arguments(config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `FluxTransformer2DModel`; the place of a token is its row and column."""
    n, _, height, width = latents.shape
    text = {name: encoded[name] for name in ("encoder_hidden_states", "pooled_projections")}
    rows, columns = torch.meshgrid(torch.arange(height // PACKING), torch.arange(width // PACKING), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
    guidance = {"guidance": torch.full((n,), GUIDANCE_SCALE, device=latents.device)}
    return {
        "hidden_states": pack_latents(latents, PACKING),
        "timestep": timesteps / 1000,
        "img_ids": places.to(latents),
        "txt_ids": latents.new_zeros(text["encoder_hidden_states"].shape[1], 3),
        **text,
        **(guidance if config["guidance_embeds"] else {}),
    }


FLUX = DenoiserKind(
    "FluxTransformer2DModel",
    example_inputs,
    components={"FluxPipeline": "transformer"},
    arguments=arguments,
    encode_captions=encode_captions,
    packing=PACKING,
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)

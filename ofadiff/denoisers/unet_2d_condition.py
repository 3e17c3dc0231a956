"""Stable Diffusion 1.x, 2.x and XL: a UNet that attends to CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.denoisers import unet_2d
from ofadiff.denoisers.kind import TEXT_TO_IMAGE_DEFAULTS, Config, DenoiserKind, Text
from ofadiff.denoisers.zeros import TEXT_TOKENS, Zeros


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `UNet2DConditionModel`."""
    config = model.config
    text_width = config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(text_width, (tuple, list)):
        text_width = text_width[0]
    inputs: dict[str, Any] = {
        **unet_2d.example_inputs(model, zeros),
        "encoder_hidden_states": zeros(TEXT_TOKENS, text_width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = zeros(config.time_cond_proj_dim)
    return inputs


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`."""
    hidden_states, _ = pipeline.encode_prompt(
        list(captions), pipeline.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden_states}


def encode_captions_xl(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `text_embeds`, `(N, channels)`."""
    hidden_states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), device=pipeline.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.config.force_zeros_for_empty_prompt:  # sampling puts zeros in place of an empty negative prompt
        given = torch.tensor([bool(caption) for caption in captions], device=pooled.device)
        hidden_states, pooled = hidden_states * given[:, None, None], pooled * given[:, None]
    return {"encoder_hidden_states": hidden_states, "text_embeds": pooled}


def arguments(config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `UNet2DConditionModel`."""
    return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": encoded["encoder_hidden_states"]}


def arguments_xl(config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of SDXL's, which is told where each image was cropped too."""
    added = {name: encoded[name] for name in ("text_embeds", "time_ids")}
    return {**arguments(config, latents, timesteps, encoded), "added_cond_kwargs": added}


STABLE_DIFFUSION = DenoiserKind(
    "UNet2DConditionModel",
    example_inputs,
    components={"StableDiffusionPipeline": "unet"},
    arguments=arguments,
    encode_captions=encode_captions,
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)
STABLE_DIFFUSION_XL = DenoiserKind(
    "UNet2DConditionModel",
    example_inputs,
    components={"StableDiffusionXLPipeline": "unet"},
    arguments=arguments_xl,
    encode_captions=encode_captions_xl,
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)

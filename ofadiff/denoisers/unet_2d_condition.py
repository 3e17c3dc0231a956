"""Stable Diffusion 1.x, 2.x and XL: a UNet that attends to CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from ofadiff.denoisers.family import Family, Text


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


def arguments(
    config: Mapping[str, Any], latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a `UNet2DConditionModel`."""
    return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": encoded["encoder_hidden_states"]}


def arguments_xl(
    config: Mapping[str, Any], latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of SDXL's, which is told where each image was cropped too."""
    added = {name: encoded[name] for name in ("text_embeds", "time_ids")}
    return {**arguments(config, latents, timesteps, encoded), "added_cond_kwargs": added}


STABLE_DIFFUSION = Family(StableDiffusionPipeline, "unet", UNet2DConditionModel, encode_captions, arguments)
STABLE_DIFFUSION_XL = Family(StableDiffusionXLPipeline, "unet", UNet2DConditionModel, encode_captions_xl, arguments_xl)

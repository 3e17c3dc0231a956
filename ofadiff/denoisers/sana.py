"""Sana: linear attention over strongly compressed latents, and Gemma's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ofadiff.denoisers.kind import (
    TEXT_TO_IMAGE_DEFAULTS,
    Config,
    DenoiserKind,
    Text,
    call_default,
    masked_text_arguments,
    where_empty,
)
from ofadiff.denoisers.zeros import Zeros, guidance, image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `SanaTransformer2DModel`."""
    return image_and_text(model, zeros, model.config.caption_channels) | guidance(model, zeros)


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `encoder_attention_mask`, `(N, tokens)`.

    Gemma is instructed to enhance a prompt, but not what guidance leads away from.
    """
    text = _encode(pipeline, captions, call_default(pipeline, "complex_human_instruction"))
    return where_empty(captions, _encode(pipeline, [""], None), text) if "" in captions else text


def _encode(pipeline: Any, captions: Sequence[str], instruction: list[str] | None) -> Text:
    hidden_states, mask, _, _ = pipeline.encode_prompt(
        list(captions),
        do_classifier_free_guidance=False,
        device=pipeline.vae.device,
        complex_human_instruction=instruction,
    )
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}


def arguments(config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `SanaTransformer2DModel`."""
    return masked_text_arguments(config, latents, timesteps * config["timestep_scale"], encoded)


SANA = DenoiserKind(
    "SanaTransformer2DModel",
    example_inputs,
    components={"SanaPipeline": "transformer"},
    arguments=arguments,
    encode_captions=encode_captions,
    call_options={"use_resolution_binning": False},
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)

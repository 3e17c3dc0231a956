"""PixArt-Σ: cross-attention to T5's embeddings; predicts the noise, and a variance that training leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ofadiff.denoisers.kind import (
    TEXT_TO_IMAGE_DEFAULTS,
    DenoiserKind,
    Text,
    call_default,
    masked_text_arguments,
)
from ofadiff.denoisers.zeros import Zeros, image_and_text


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `PixArtTransformer2DModel`."""
    config = model.config
    inputs = image_and_text(model, zeros, config.caption_channels or config.cross_attention_dim)
    if model.use_additional_conditions:
        inputs["added_cond_kwargs"] = {"resolution": zeros(2), "aspect_ratio": zeros(1)}
    else:
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `encoder_attention_mask`, `(N, tokens)`."""
    hidden_states, mask, _, _ = pipeline.encode_prompt(
        list(captions),
        do_classifier_free_guidance=False,
        device=pipeline.vae.device,
        clean_caption=call_default(pipeline, "clean_caption"),
    )
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}


PIXART_SIGMA = DenoiserKind(
    "PixArtTransformer2DModel",
    example_inputs,
    components={"PixArtSigmaPipeline": "transformer"},
    arguments=masked_text_arguments,
    encode_captions=encode_captions,
    call_options={"use_resolution_binning": False},
    training_defaults=TEXT_TO_IMAGE_DEFAULTS,
)

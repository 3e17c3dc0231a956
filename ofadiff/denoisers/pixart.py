"""PixArt-Σ: cross-attention to T5's embeddings; predicts the noise, and a variance that training leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

from ofadiff.denoisers.family import Family, Text, call_default, masked_text_arguments


def encode_captions(pipeline: Any, captions: Sequence[str]) -> Text:
    """`encoder_hidden_states`, `(N, tokens, channels)`, and `encoder_attention_mask`, `(N, tokens)`."""
    hidden_states, mask, _, _ = pipeline.encode_prompt(
        list(captions),
        do_classifier_free_guidance=False,
        device=pipeline.vae.device,
        clean_caption=call_default(pipeline, "clean_caption"),
    )
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}


PIXART_SIGMA = Family(
    PixArtSigmaPipeline,
    "transformer",
    PixArtTransformer2DModel,
    encode_captions,
    masked_text_arguments,
    call_options={"use_resolution_binning": False},
)

"""Sana: linear attention over strongly compressed latents, and Gemma's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from ofadiff.denoisers.family import Family, Text, call_default, masked_text_arguments, where_empty


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


def arguments(
    config: Mapping[str, Any], latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a `SanaTransformer2DModel`."""
    return masked_text_arguments(config, latents, timesteps * config["timestep_scale"], encoded)


SANA = Family(
    SanaPipeline,
    "transformer",
    SanaTransformer2DModel,
    encode_captions,
    arguments,
    call_options={"use_resolution_binning": False},
)

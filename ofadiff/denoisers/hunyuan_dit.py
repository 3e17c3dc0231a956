"""Hunyuan-DiT: cross-attention to the embeddings of CLIP and T5."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import Zeros, image_and_text, sample_size


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `HunyuanDiT2DModel`."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    height, width = sample_size(model)
    inputs = {
        **image_and_text(model, zeros, config.cross_attention_dim, config.text_len),
        "text_embedding_mask": zeros(config.text_len),
        "encoder_hidden_states_t5": zeros(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": zeros(config.text_len_t5),
    }
    tokens = height * width // config.patch_size**2
    angles = zeros.shared(tokens, head_dim)
    inputs["image_rotary_emb"] = (angles, angles)
    if config.use_style_cond_and_image_meta_size:
        inputs["image_meta_size"] = zeros(6)
        inputs["style"] = zeros.whole()
    return inputs


HUNYUAN_DIT = DenoiserKind("HunyuanDiT2DModel", example_inputs)

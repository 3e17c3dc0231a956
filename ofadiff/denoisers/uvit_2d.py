"""aMUSEd: tokens of an image, some of them masked."""

from __future__ import annotations

from typing import Any

from torch import nn

from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.zeros import TEXT_TOKENS, Zeros, sample_size


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of an `UVit2DModel`."""
    config = model.config
    return {
        "input_ids": zeros.whole(*sample_size(model)),
        "encoder_hidden_states": zeros(TEXT_TOKENS, config.encoder_hidden_size),
        "pooled_text_emb": zeros(config.cond_embed_dim),
        "micro_conds": zeros(5),
    }


UVIT_2D = DenoiserKind("UVit2DModel", example_inputs)

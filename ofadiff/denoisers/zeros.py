"""Zeros of the shapes that denoisers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEXT_TOKENS = 77
# Of transformers whose text encoder is a T5 or a language model.
LONG_TEXT_TOKENS = 256
# Where a transformer's config names no size: latents of 1024 pixels, and of a video of 5 seconds, 480 pixels high.
LATENT_SIZE = 128
LATENT_VIDEO = (21, 60, 104)


class NoInputsError(ValueError):
    """Nothing says what a model is called with."""


class Zeros:
    """Zeros for every sample of a batch, on a model's device, in its dtype."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.batch_size, self.device, self.dtype = batch_size, model.device, model.dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(self.batch_size, *shape, device=self.device, dtype=dtype or self.dtype)

    def whole(self, *shape: int) -> torch.Tensor:
        """Whole numbers."""
        return self(*shape, dtype=torch.long)

    def shared(self, *shape: int) -> torch.Tensor:
        """One tensor for the whole batch."""
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)


def sample_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in a model's config. Raises NoInputsError if there are none."""
    size = model.config.sample_size
    if size is None:
        raise NoInputsError(f"the config of this {type(model).__name__} has no sample_size; pass inputs")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_and_text(
    model: nn.Module, zeros: Zeros, text_width: int, text_tokens: int = LONG_TEXT_TOKENS
) -> dict[str, Any]:
    """What every text-to-image transformer over latents takes."""
    return {
        "hidden_states": zeros(model.config.in_channels, *sample_size(model)),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(text_tokens, text_width),
    }


def packed_image_and_text(model: nn.Module, zeros: Zeros, axes: int) -> dict[str, Any]:
    """A sequence of image tokens, two latents wide and high each, and one of text, with their positions."""
    tokens = (LATENT_SIZE // 2) ** 2
    positions = zeros.shared(tokens + LONG_TEXT_TOKENS, axes)
    inputs = {
        "hidden_states": zeros(tokens, model.config.in_channels),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.joint_attention_dim),
        "timestep": zeros(),
        "img_ids": positions[:tokens],
        "txt_ids": positions[tokens:],
    }
    return inputs | guidance(model, zeros)


def guidance(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """The guidance scale of models that are told it."""
    return {"guidance": zeros()} if model.config.guidance_embeds else {}

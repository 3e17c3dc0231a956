"""What training needs to know of a kind of text-to-image pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

Text = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of text-to-image pipeline.

    Attributes:
        pipeline_class: The diffusers class.
        denoiser: Name of the pipeline's component that denoises.
        denoiser_class: Its class.
        encode_captions: (pipeline, captions) -> their text, tensors with a row for each caption, as the pipeline's own
            call encodes it; an empty caption is what it guides away from when no negative prompt is given.
        arguments: (the denoiser's config, noisy latents `(N, C, H, W)`, their timesteps `(N,)`, the text and everything
            else of the batch) -> keyword arguments of the denoiser's forward, as the pipeline's own call gives them.
        packing: Side of the square of latents that is one token of the denoiser's input and output, 1 where these are
            images.
        call_options: What the pipeline's call needs to sample at just the height and width that it is given.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser: str
    denoiser_class: type[ModelMixin]
    encode_captions: Callable[[Any, Sequence[str]], Text]
    arguments: Callable[[Mapping[str, Any], Tensor, Tensor, Mapping[str, Any]], dict[str, Any]]
    packing: int = 1
    call_options: Mapping[str, Any] = field(default_factory=dict)


def pack_latents(latents: Tensor, side: int) -> Tensor:
    """Each square of latents as one token: `(N, C, H, W)` to `(N, H/side · W/side, C · side²)`; as they are if 1."""
    if side == 1:
        return latents
    n, channels, height, width = latents.shape
    squares = latents.view(n, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * side * side)


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """The value that an argument of the pipeline's call has when it is not given."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def masked_text_arguments(
    config: Mapping[str, Any], latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of transformers that are told how long each caption is."""
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return {"hidden_states": latents, "timestep": timesteps, **{name: encoded[name] for name in names}}


def where_empty(captions: Sequence[str], nothing: Text, text: Text) -> Text:
    """The text of captions, with another one, of one row, in place of the empty ones."""
    empty = torch.tensor([not caption for caption in captions])
    replaced = {name: value.clone() for name, value in text.items()}
    for name, value in replaced.items():
        value[empty.to(value.device)] = nothing[name]
    return replaced

"""Class-conditional transformers: their inputs, and labels that are left out for classifier-free guidance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ofadiff.denoisers.prepare import DenoiserInputs, noisy_inputs
from ofadiff.noise.draws import Batch, draw_latents


def keep_labels(model: nn.Module) -> None:
    """Stops a model from leaving out labels by itself while it trains.

    Each block of diffusers' DiT draws its own, unlike any other block and unlike the teacher; `prepare_class_labels`
    leaves them out for the whole model at once.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def drop_labels(labels: Tensor, seeds: Tensor, null_class: int, class_dropout_prob: float) -> Tensor:
    """Labels, `(N,)`, with some replaced by the null class; each sample's seed decides."""
    dropped = [random.Random(f"{seed} label").random() < class_dropout_prob for seed in seeds.tolist()]
    return labels.masked_fill(torch.tensor(dropped, device=labels.device), null_class)


def prepare_class_labels(
    batch: Batch,
    noise_scheduler: Any,
    null_class: int,
    class_dropout_prob: float = 0.1,
    encode: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> DenoiserInputs:
    """Inputs of a `DiTTransformer2DModel` under a DDPM-style scheduler.

    Args:
        batch: `pixel_values`, `(N, C, H, W)` in [-1, 1]; `class_labels` and `seeds`, `(N,)`.
        noise_scheduler: As in `noisy_inputs`.
        null_class: The label of no class.
        class_dropout_prob: Share of samples that get it.
        encode: Pixels to the distribution of their latents, such as `encode_images` with a VAE bound; None for a model
            of pixels.
    """
    seeds = batch["seeds"]
    x0 = batch["pixel_values"] if encode is None else draw_latents(encode(batch["pixel_values"]), seeds)
    labels = drop_labels(batch["class_labels"], seeds, null_class, class_dropout_prob)
    return noisy_inputs(x0, seeds, noise_scheduler, {"class_labels": labels}, sample_name="hidden_states")

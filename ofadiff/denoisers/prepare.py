"""Turns a batch into what a denoiser is called with, and what it should predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ofadiff.denoisers.family import Family, pack_latents
from ofadiff.noise.diffusion import diffuse
from ofadiff.noise.draws import Batch, draw_latents
from ofadiff.noise.noisy_samples import ForwardProcess


@dataclass(frozen=True)
class DenoiserInputs:
    """One prepared batch.

    Attributes:
        arguments: Keyword arguments of the denoiser's forward, the noisy sample and the timesteps among them.
        target: What the denoiser should predict, `(N, C, H, W)`.
        weight: Of each sample's loss, `(N,)`.
    """

    arguments: dict[str, Any]
    target: Tensor
    weight: Tensor


Prepare = Callable[[Batch], DenoiserInputs]


def noisy_inputs(
    x0: Tensor, seeds: Tensor, noise_scheduler: Any, conditions: dict[str, Any], sample_name: str = "sample"
) -> DenoiserInputs:
    """What a denoiser under a DDPM-style scheduler is called with, and what it should predict.

    Args:
        x0: As in `diffuse`.
        seeds: As in `diffuse`.
        noise_scheduler: As in `diffuse`.
        conditions: Further arguments of the denoiser's forward.
        sample_name: What the denoiser's forward calls the noisy sample.
    """
    noisy = diffuse(x0, seeds, noise_scheduler)
    arguments = {sample_name: noisy.sample, "timestep": noisy.timesteps, **conditions}
    return DenoiserInputs(arguments, noisy.target, noisy.weight)


def prepare_pixels(batch: Batch, noise_scheduler: Any) -> DenoiserInputs:
    """Inputs of an unconditional or class-conditional `UNet2DModel` under a DDPM-style scheduler.

    Args:
        batch: `pixel_values`, `(N, C, H, W)` in [-1, 1]; `seeds`, `(N,)`; and for class-conditional models
            `class_labels`, `(N,)`.
        noise_scheduler: As in `diffuse`.
    """
    conditions = {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}
    return noisy_inputs(batch["pixel_values"], batch["seeds"], noise_scheduler, conditions)


def prepare_latents(
    batch: Batch,
    family: Family,
    config: Mapping[str, Any],
    forward_process: ForwardProcess,
    encode: Callable[[Batch], Batch] | None = None,
) -> DenoiserInputs:
    """Inputs of a text-to-image pipeline's denoiser.

    Args:
        batch: What `encode` takes; without it, what `TextToImageEncoder` gives: the distribution of the latents,
            `latent_mean` and `latent_std`, `(N, C, H, W)`; the text; and `seeds`, `(N,)`.
        family: The kind of pipeline.
        config: Of the denoiser.
        forward_process: How latents become noisy, such as `diffuse` with its scheduler bound.
        encode: Turns images and captions into that, such as a `TextToImageEncoder`.
    """
    encoded = batch if encode is None else encode(batch)
    noisy = forward_process(draw_latents(encoded, encoded["seeds"]), encoded["seeds"])
    arguments = family.arguments(config, noisy.sample, noisy.timesteps, encoded)
    return DenoiserInputs(arguments, pack_latents(noisy.target, family.packing), noisy.weight)

"""Turns a batch into what a denoiser is called with, and what it should predict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ofadiff.denoisers.kind import Config, DenoiserKind, pack_latents
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.noise.diffusion import diffuse
from ofadiff.noise.draws import Batch, draw_latents
from ofadiff.noise.noisy_samples import ForwardProcess
from ofadiff.recordings.recorded_call import answer_rows


@dataclass(frozen=True)
class DenoiserInputs:
    """One prepared batch.

    Attributes:
        arguments: Keyword arguments of the denoiser's forward, the noisy sample and the timesteps among them.
        target: What the denoiser should predict, `(N, C, H, W)`, packed where its kind packs.
        weight: Weight of each sample's loss, `(N,)`.
        time: Name of the argument that is the time.
        dtype: Floating-point arguments in this dtype follow the precision of the weights; by default all do.
        options: Arguments beside these.
    """

    arguments: dict[str, Any]
    target: Tensor
    weight: Tensor
    time: str | None = "timestep"
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: {"return_dict": False})


# Of recordings a batch is several forwards.
Prepare = Callable[[Batch], DenoiserInputs | Sequence[DenoiserInputs]]


def parts_of(inputs: DenoiserInputs | Sequence[DenoiserInputs]) -> Sequence[DenoiserInputs]:
    """The forwards of a prepared batch."""
    return [inputs] if isinstance(inputs, DenoiserInputs) else inputs


def prepare_recorded(batch: Batch, channels: int | None = None) -> list[DenoiserInputs]:
    """Inputs of a denoiser that is trained on what the original answered.

    Args:
        batch: What `RecordedSamples` give: `parts`, the recorded calls of one forward each.
        channels: Only so many channels of an answer `(N, C, …)` count, where the others are a variance that the
            pipeline leaves out; all by default.
    """
    prepared = []
    for call in batch["parts"]:
        target = answer_rows(call.answer)
        target = target if channels is None else target[:, :channels]
        weight = torch.ones(len(target), device=target.device)
        prepared.append(DenoiserInputs(call.arguments, target, weight, call.time, call.dtype, {}))
    return prepared


def prepare_mixed(batch: Batch, recorded: Prepare, images: Prepare) -> list[DenoiserInputs]:
    """Inputs of a denoiser that is trained on recorded calls and on images.

    Args:
        batch: What `MixedSamples` give.
        recorded: Prepares the recorded calls, such as `prepare_recorded`.
        images: Prepares a batch of images.
    """
    prepared = [*parts_of(recorded(batch))]
    if "images" not in batch:
        return prepared
    pictures = batch["images"]
    if "quantiles" in batch:
        pictures = {**pictures, "quantiles": batch["quantiles"][batch["are_images"]]}
    return [*prepared, *parts_of(images(pictures))]


def prepare_batch(
    batch: Batch,
    kind: DenoiserKind,
    config: Config,
    forward_process: ForwardProcess,
    encode: Callable[[Batch], Batch] | None = None,
) -> DenoiserInputs:
    """Inputs of a denoiser that is trained.

    Args:
        batch: What `encode` takes; without it, what an `Encoder` gives: `pixel_values`, `(N, C, H, W)` in [-1, 1], or
            the distribution of the latents, `latent_mean` and `latent_std`, `(N, C, H, W)`; the text or the
            `class_labels`, `(N,)`; and `seeds`, `(N,)`. Where there are `quantiles` too, `(N,)` in [0, 1), they fix
            the noise levels, and not the seeds.
        kind: Kind of the denoiser.
        config: Config of the denoiser.
        forward_process: How samples become noisy, such as `diffuse` with its scheduler bound.
        encode: Turns images and captions into that, such as an `Encoder`.
    """
    assert kind.arguments is not None
    encoded = batch if encode is None else encode(batch)
    seeds = encoded["seeds"]
    x0 = encoded["pixel_values"] if "pixel_values" in encoded else draw_latents(encoded, seeds)
    noisy = forward_process(x0, seeds, quantiles=batch.get("quantiles"))
    arguments = kind.arguments(config, noisy.sample, noisy.timesteps, encoded)
    return DenoiserInputs(arguments, pack_latents(noisy.target, kind.packing), noisy.weight)


def prepare_pixels(batch: Batch, noise_scheduler: Any) -> DenoiserInputs:
    """Inputs of a `UNet2DModel` of pixels under a DDPM-style scheduler; see `prepare_batch` and `diffuse`."""
    return prepare_batch(batch, UNET_2D, {}, functools.partial(diffuse, noise_scheduler=noise_scheduler))

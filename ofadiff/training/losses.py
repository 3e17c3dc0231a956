"""The denoising loss L_n of a sample n = (x0, t, ε), in two parts.

A *prepare* function turns a batch into what the denoiser is called with and the target it should predict; the loss
compares. Another kind of model is another prepare function, another forward process (`diffuse` here, or flow matching)
another function that it is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ofadiff.training.families import Family, pack_latents

Batch = dict[str, Any]


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


@dataclass(frozen=True)
class NoisySamples:
    """What a forward process makes of clean samples.

    Attributes:
        sample: x_t, `(N, C, H, W)`.
        timesteps: `(N,)`, as the pipeline's scheduler counts them.
        target: What the denoiser should predict, `(N, C, H, W)`.
        weight: Of each sample's loss, `(N,)`.
    """

    sample: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


# (x0, seeds) -> noisy samples.
ForwardProcess = Callable[[Tensor, Tensor], NoisySamples]


def draw_noise(seeds: Tensor, shape: tuple[int, ...], num_timesteps: int) -> tuple[Tensor, Tensor]:
    """The timestep and the noise of each sample, from the sample's own seed.

    Every sample has its own generator (on the CPU, whatever device the model is on), so its draw depends neither on how
    a batch is split over processes and micro-steps nor on the hardware.

    Args:
        seeds: Shape `(N,)`, integer.
        shape: Of one sample, `(C, H, W)`.
        num_timesteps: Timesteps are drawn uniformly from 0 to this, exclusive.

    Returns:
        Noise `(N, C, H, W)` and timesteps `(N,)`, on the CPU.
    """
    noise, timesteps = [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(timesteps)


# What a denoiser of each prediction type should say: (noise_scheduler, x0, ε, t) -> target.
def _epsilon(noise_scheduler: Any, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise


def _v_prediction(noise_scheduler: Any, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise_scheduler.get_velocity(x0, noise, timesteps)


def _sample(noise_scheduler: Any, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return x0


TARGETS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "sample": _sample,
}


# What min(SNR, γ) is divided by, so that the loss counts as one on x0 does: (SNR) -> divisor.
SNR_DIVISORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
}


def min_snr_weight(noise_scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss, `(N,)`: min(SNR, γ) in terms of x0 (Hang et al., arXiv 2303.09556).

    Raises:
        ValueError: If γ is not positive and finite: all weights would be zero, or SNR alone.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"snr_gamma is {gamma}; it must be positive and finite, such as 5")
    snr = compute_snr(noise_scheduler, timesteps)
    return snr.clamp(max=gamma) / SNR_DIVISORS[noise_scheduler.config.prediction_type](snr)


def draw_normal(seeds: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal values for each sample, `(N, *shape)`, on the CPU; independent for every purpose."""
    values = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {purpose}").getrandbits(63))
        values.append(torch.randn(shape, generator=generator))
    return torch.stack(values)


def draw_latents(encoded: Batch, seeds: Tensor) -> Tensor:
    """A draw, `(N, C, H, W)`, from the distribution that `latent_mean` and `latent_std` describe."""
    mean, std = encoded["latent_mean"], encoded["latent_std"]
    return mean + std * draw_normal(seeds, tuple(mean.shape[1:]), "latent").to(mean)


def diffuse(
    x0: Tensor, seeds: Tensor, noise_scheduler: Any, snr_gamma: float | None = None, noise_offset: float = 0.0
) -> NoisySamples:
    """The forward process of a DDPM-style scheduler.

    Args:
        x0: What is denoised, `(N, C, H, W)`.
        seeds: `(N,)`, integers that fix each sample's noise and timestep.
        noise_scheduler: A `DDPMScheduler`, or another with its `add_noise` and `get_velocity`.
        snr_gamma: γ of `min_snr_weight`; None weights all timesteps alike.
        noise_offset: Size of a random shift of each channel's noise, which lets a model learn very dark and very bright
            images.

    Raises:
        ValueError: If the scheduler's prediction type is not one of `TARGETS`.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in TARGETS:
        raise ValueError(f"unknown prediction type {prediction_type!r}; accepted: {', '.join(TARGETS)}")
    noise, timesteps = draw_noise(seeds, tuple(x0.shape[1:]), noise_scheduler.config.num_train_timesteps)
    if noise_offset:
        noise = noise + noise_offset * draw_normal(seeds, (x0.shape[1], 1, 1), "noise offset")
    noise, timesteps = noise.to(x0), timesteps.to(x0.device)
    if snr_gamma is None:
        weight = torch.ones(len(x0), device=x0.device)
    else:
        weight = min_snr_weight(noise_scheduler, timesteps, snr_gamma)
    target = TARGETS[prediction_type](noise_scheduler, x0, noise, timesteps)
    return NoisySamples(noise_scheduler.add_noise(x0, noise, timesteps), timesteps, target, weight)


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


def predict(model: nn.Module, inputs: DenoiserInputs) -> Tensor:
    """The denoiser's prediction, `(N, C, H, W)`, in the precision of its weights.

    Timesteps stay what they are, for the denoiser to embed: bfloat16 knows two of 998, 999 and 1000 at most.
    """
    arguments = _as_dtype(inputs.arguments, next(model.parameters()).dtype)
    arguments["timestep"] = inputs.arguments["timestep"]
    return model(**arguments, return_dict=False)[0]


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _as_dtype(entry, dtype) for name, entry in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32: two of `(N, …)` to `(N,)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def prediction_loss(prediction: Tensor, inputs: DenoiserInputs) -> Tensor:
    """Each sample's loss L_n, `(N,)`. Channels beyond the target's, a learned variance, do not count."""
    return inputs.weight * mean_squared_error(prediction[:, : inputs.target.shape[1]], inputs.target)


def denoising_loss(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """Each sample's loss L_n, `(N,)`. With `prepare` bound it is the `loss_fn` of `score_channels`."""
    inputs = prepare(batch)
    return prediction_loss(predict(model, inputs), inputs)

"""The forward process of DDPM-style schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

from ofadiff.noise.draws import draw_noise, draw_normal
from ofadiff.noise.noisy_samples import NoisySamples


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


def diffuse(
    x0: Tensor,
    seeds: Tensor,
    noise_scheduler: Any,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    quantiles: Tensor | None = None,
) -> NoisySamples:
    """The forward process of a DDPM-style scheduler.

    Args:
        x0: What is denoised, `(N, C, H, W)`.
        seeds: `(N,)`, integers that fix each sample's noise and timestep.
        noise_scheduler: A `DDPMScheduler`, or another with its `add_noise` and `get_velocity`.
        snr_gamma: γ of `min_snr_weight`; None weights all timesteps alike.
        noise_offset: Size of a random shift of each channel's noise, which lets a model learn very dark and very bright
            images.
        quantiles: Where among all timesteps those of the samples lie, `(N,)` in [0, 1), if the seeds do not fix them.

    Raises:
        ValueError: If the scheduler's prediction type is not one of `TARGETS`.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in TARGETS:
        raise ValueError(f"unknown prediction type {prediction_type!r}; accepted: {', '.join(TARGETS)}")
    num_timesteps = noise_scheduler.config.num_train_timesteps
    noise, timesteps = draw_noise(seeds, tuple(x0.shape[1:]), num_timesteps, quantiles)
    if noise_offset:
        noise = noise + noise_offset * draw_normal(seeds, (x0.shape[1], 1, 1), "noise offset")
    noise, timesteps = noise.to(x0), timesteps.to(x0.device)
    if snr_gamma is None:
        weight = torch.ones(len(x0), device=x0.device)
    else:
        weight = min_snr_weight(noise_scheduler, timesteps, snr_gamma)
    target = TARGETS[prediction_type](noise_scheduler, x0, noise, timesteps)
    return NoisySamples(noise_scheduler.add_noise(x0, noise, timesteps), timesteps, target, weight)

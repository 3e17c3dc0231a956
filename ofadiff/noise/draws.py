"""What is random about a sample, drawn from the sample's own seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

# The largest number below one in float32.
BELOW_ONE = 1 - 2**-24


def draw_noise(
    seeds: Tensor, shape: tuple[int, ...], num_timesteps: int, quantiles: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The timestep and the noise of each sample, from the sample's own seed.

    Every sample has its own generator (on the CPU, whatever device the model is on), so its draw depends neither on how
    a batch is split over processes and micro-steps nor on the hardware.

    Args:
        seeds: Shape `(N,)`, integer.
        shape: Shape of one sample, `(C, H, W)`.
        num_timesteps: Timesteps are drawn uniformly from 0 to this, exclusive.
        quantiles: Where in their distribution the timesteps lie, `(N,)` in [0, 1), if not drawn from the seeds; the
            noise is the same.

    Returns:
        Noise `(N, C, H, W)` and timesteps `(N,)`, on the CPU.
    """
    noise, timesteps = [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    drawn = torch.stack(timesteps)
    return torch.stack(noise), drawn if quantiles is None else (quantiles.cpu() * num_timesteps).to(drawn)


def stratified_quantiles(count: int, step: int, seed: int) -> Tensor:
    """Quantiles of the noise levels of a step's samples, one in each of `count` equal parts of [0, 1), in any order.

    So a step sees all noise levels, and its gradient varies less from step to step than with independent draws, while
    each quantile alone is uniform still. Where in its part a quantile lies is drawn for each; a shift that all share
    (Kingma et al., arXiv 2107.00630, appendix I.1) moves the levels' mean more.

    Args:
        count: Samples of the step, over all processes and micro-steps.
        step: The optimizer step, from 0.
        seed: The run's seed.

    Returns:
        `(count,)` in [0, 1), float32; a pure function of the arguments.
    """
    draw = random.Random(f"{seed} quantiles {step}")
    parts = list(range(count))
    draw.shuffle(parts)
    quantiles = [(part + draw.random()) / count for part in parts]
    return torch.tensor(quantiles).clamp(max=BELOW_ONE)


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

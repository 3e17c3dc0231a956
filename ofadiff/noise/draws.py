"""What is random about a sample, drawn from the sample's own seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]


def draw_noise(seeds: Tensor, shape: tuple[int, ...], num_timesteps: int) -> tuple[Tensor, Tensor]:
    """The timestep and the noise of each sample, from the sample's own seed.

    Every sample has its own generator (on the CPU, whatever device the model is on), so its draw depends neither on how
    a batch is split over processes and micro-steps nor on the hardware.

    Args:
        seeds: Shape `(N,)`, integer.
        shape: Shape of one sample, `(C, H, W)`.
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

"""Which forward process a pipeline was trained with, by its scheduler."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler

from ofadiff.noise.diffusion import TARGETS, diffuse
from ofadiff.noise.flow_matching import interpolate, is_flow_matching, static_shift
from ofadiff.noise.noisy_samples import ForwardProcess


def forward_process_of(
    name: str, config: Mapping[str, Any], snr_gamma: float | None = None, noise_offset: float = 0.0
) -> ForwardProcess:
    """How training makes samples noisy, from the configuration of a pipeline's scheduler.

    Args:
        name: Name of the scheduler's class.
        config: Its own.
        snr_gamma: As in `diffuse`.
        noise_offset: As in `diffuse`.

    Raises:
        ValueError: If the scheduler is neither DDPM-style nor one of flow matching, or one of flow matching is to be
            trained with what only DDPM-style ones have.
    """
    if not is_flow_matching(name, config):
        scheduler = make_noise_scheduler(name, config)
        return functools.partial(diffuse, noise_scheduler=scheduler, snr_gamma=snr_gamma, noise_offset=noise_offset)
    for flag, value in (("snr_gamma", snr_gamma), ("noise_offset", noise_offset)):
        if value:
            raise ValueError(f"--{flag} is for DDPM-style schedulers; this model's {name} is one of flow matching")
    timesteps = config.get("num_train_timesteps", 1000)
    return functools.partial(interpolate, shift=static_shift(config), num_train_timesteps=timesteps)


def make_noise_scheduler(name: str, config: Mapping[str, Any]) -> DDPMScheduler:
    """The forward process of a pipeline's DDPM-style scheduler, called `name`.

    Raises:
        ValueError: If it is none, or predicts something else than the noise, the velocity or the sample.
    """
    scheduler = DDPMScheduler.from_config(config) if "beta_schedule" in config else None
    if scheduler is None or scheduler.config.prediction_type not in TARGETS:
        raise ValueError(
            f"the scheduler is a {name} with prediction type {config.get('prediction_type')!r}; "
            f"expected a DDPM-style one with {', '.join(TARGETS)}"
        )
    return scheduler

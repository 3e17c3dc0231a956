"""Flow matching as Stable Diffusion 3, Flux and Sana are trained (Esser et al., arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ofadiff.noise.draws import draw_normal
from ofadiff.noise.noisy_samples import NoisySamples


def is_flow_matching(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of the class called `name`, with this configuration, is one of flow matching."""
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def static_shift(config: Mapping[str, Any]) -> float:
    """The shift of `shift_sigmas` in a scheduler's configuration.

    A scheduler that shifts by each image's resolution has none to train with, as in diffusers' training examples.
    """
    if config.get("use_dynamic_shifting"):
        return 1.0
    return config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Noise levels for a higher resolution, equation 23: more of the noise is needed to hide as much of the image."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def interpolate(
    x0: Tensor,
    seeds: Tensor,
    shift: float = 1.0,
    num_train_timesteps: int = 1000,
    quantiles: Tensor | None = None,
) -> NoisySamples:
    """The forward process: x_t = (1 − σ) x0 + σ ε, with the velocity ε − x0 as the target.

    σ is logit-normal, then shifted (section 3.1, with m = 0 and s = 1).

    Args:
        x0: What is denoised, `(N, C, H, W)`.
        seeds: `(N,)`, integers that fix each sample's σ and ε.
        shift: Shift of `shift_sigmas`.
        num_train_timesteps: What σ is counted in.
        quantiles: Where in their distribution the σ lie, `(N,)` in [0, 1), if the seeds do not fix them.
    """
    normal = draw_normal(seeds, (), "sigma") if quantiles is None else torch.special.ndtri(quantiles.cpu())
    sigmas = shift_sigmas(normal.sigmoid(), shift).to(x0)
    noise = draw_normal(seeds, tuple(x0.shape[1:]), "noise").to(x0)
    share = sigmas.view(-1, 1, 1, 1)
    sample = (1 - share) * x0 + share * noise
    return NoisySamples(sample, num_train_timesteps * sigmas, noise - x0, torch.ones_like(sigmas))

"""What a forward process makes of clean samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class NoisySamples:
    """What a forward process makes of clean samples.

    Attributes:
        sample: x_t, `(N, C, H, W)`.
        timesteps: `(N,)`, as the pipeline's scheduler counts them.
        target: What the denoiser should predict, `(N, C, H, W)`.
        weight: Weight of each sample's loss, `(N,)`.
    """

    sample: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class ForwardProcess(Protocol):
    """How clean samples become noisy, such as `diffuse` with its scheduler bound."""

    def __call__(self, x0: Tensor, seeds: Tensor, *, quantiles: Tensor | None = None) -> NoisySamples:
        """Noisy samples of `x0`, `(N, C, H, W)`.

        Args:
            x0: What is denoised.
            seeds: `(N,)`, integers that fix each sample's noise, and its noise level where there are no quantiles.
            quantiles: Where in their distribution the noise levels lie, `(N,)` in [0, 1).
        """

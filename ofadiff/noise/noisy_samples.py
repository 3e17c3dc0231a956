"""What a forward process makes of clean samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


# (x0, seeds) -> noisy samples.
ForwardProcess = Callable[[Tensor, Tensor], NoisySamples]

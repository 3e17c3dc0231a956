"""The denoising loss L_n of a sample n = (x0, t, ε), in two parts.

A *prepare* function turns a batch into what the denoiser is called with and the target it should predict; the loss
compares. Another kind of model (latents with text, flow matching) is another prepare function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def prepare_pixels(batch: Batch, noise_scheduler: Any) -> DenoiserInputs:
    """Inputs of an unconditional or class-conditional `UNet2DModel` under a DDPM-style scheduler.

    Args:
        batch: `pixel_values`, `(N, C, H, W)` in [-1, 1]; `seeds`, `(N,)`, integers that fix each sample's noise and
            timestep; and for class-conditional models `class_labels`, `(N,)`.
        noise_scheduler: A `DDPMScheduler`, or another with its `add_noise` and `get_velocity`.

    Raises:
        ValueError: If the scheduler's prediction type is not one of `TARGETS`.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in TARGETS:
        raise ValueError(f"unknown prediction type {prediction_type!r}; accepted: {', '.join(TARGETS)}")
    x0 = batch["pixel_values"]
    noise, timesteps = draw_noise(batch["seeds"], tuple(x0.shape[1:]), noise_scheduler.config.num_train_timesteps)
    noise, timesteps = noise.to(x0), timesteps.to(x0.device)

    arguments = {"sample": noise_scheduler.add_noise(x0, noise, timesteps), "timestep": timesteps}
    if "class_labels" in batch:
        arguments["class_labels"] = batch["class_labels"]
    target = TARGETS[prediction_type](noise_scheduler, x0, noise, timesteps)
    return DenoiserInputs(arguments, target, torch.ones(len(x0), device=x0.device))


def predict(model: nn.Module, inputs: DenoiserInputs) -> Tensor:
    """The denoiser's prediction, `(N, C, H, W)`."""
    return model(**inputs.arguments, return_dict=False)[0]


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32: two of `(N, …)` to `(N,)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def denoising_loss(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """Each sample's loss L_n, `(N,)`. With `prepare` bound it is the `loss_fn` of `score_channels`."""
    inputs = prepare(batch)
    return inputs.weight * mean_squared_error(predict(model, inputs), inputs.target)

"""The denoising loss L_n of a sample n = (x0, t, ε), in two parts.

A *prepare* function turns a batch into what the denoiser is called with and the target it should predict; the loss
compares. Another kind of model (flow matching, say) is another prepare function.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
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


# What min(SNR, γ) is divided by, so that the loss counts as one on x0 does: (SNR) -> divisor.
SNR_DIVISORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
}


def min_snr_weight(noise_scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss, `(N,)`: min(SNR, γ) in terms of x0 (Hang et al., arXiv 2303.09556)."""
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


def noisy_inputs(
    x0: Tensor,
    seeds: Tensor,
    noise_scheduler: Any,
    conditions: dict[str, Any],
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    sample_name: str = "sample",
) -> DenoiserInputs:
    """A noisy sample for the denoiser, and what it should predict.

    Args:
        x0: What is denoised, `(N, C, H, W)`.
        seeds: `(N,)`, integers that fix each sample's noise and timestep.
        noise_scheduler: A `DDPMScheduler`, or another with its `add_noise` and `get_velocity`.
        conditions: Further arguments of the denoiser's forward.
        snr_gamma: γ of `min_snr_weight`; None weights all timesteps alike.
        noise_offset: Size of a random shift of each channel's noise, which lets a model learn very dark and very bright
            images.
        sample_name: What the denoiser's forward calls the noisy sample.

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

    arguments = {sample_name: noise_scheduler.add_noise(x0, noise, timesteps), "timestep": timesteps, **conditions}
    target = TARGETS[prediction_type](noise_scheduler, x0, noise, timesteps)
    if snr_gamma is None:
        weight = torch.ones(len(x0), device=x0.device)
    else:
        weight = min_snr_weight(noise_scheduler, timesteps, snr_gamma)
    return DenoiserInputs(arguments, target, weight)


def prepare_pixels(batch: Batch, noise_scheduler: Any) -> DenoiserInputs:
    """Inputs of an unconditional or class-conditional `UNet2DModel` under a DDPM-style scheduler.

    Args:
        batch: `pixel_values`, `(N, C, H, W)` in [-1, 1]; `seeds`, `(N,)`; and for class-conditional models
            `class_labels`, `(N,)`.
        noise_scheduler: As in `noisy_inputs`.
    """
    conditions = {"class_labels": batch["class_labels"]} if "class_labels" in batch else {}
    return noisy_inputs(batch["pixel_values"], batch["seeds"], noise_scheduler, conditions)


def prepare_latents(
    batch: Batch,
    noise_scheduler: Any,
    encode: Callable[[Batch], Batch] | None = None,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
) -> DenoiserInputs:
    """Inputs of a text-conditional `UNet2DConditionModel` under a DDPM-style scheduler.

    Args:
        batch: What `encode` takes; without it, what `TextToImageEncoder` gives: the distribution of the latents,
            `latent_mean` and `latent_std`, `(N, C, H, W)`; `encoder_hidden_states`, `(N, tokens, channels)`; `seeds`,
            `(N,)`; and for SDXL `text_embeds`, `(N, channels)`, and `time_ids`, `(N, 6)`.
        noise_scheduler: As in `noisy_inputs`.
        encode: Turns images and captions into that, such as a `TextToImageEncoder`.
        snr_gamma: As in `noisy_inputs`.
        noise_offset: As in `noisy_inputs`.
    """
    encoded = batch if encode is None else encode(batch)
    seeds = encoded["seeds"]
    x0 = draw_latents(encoded, seeds)
    conditions = {"encoder_hidden_states": encoded["encoder_hidden_states"]}
    if "text_embeds" in encoded:
        conditions["added_cond_kwargs"] = {name: encoded[name] for name in ("text_embeds", "time_ids")}
    return noisy_inputs(x0, seeds, noise_scheduler, conditions, snr_gamma, noise_offset)


def predict(model: nn.Module, inputs: DenoiserInputs) -> Tensor:
    """The denoiser's prediction, `(N, C, H, W)`, in the precision of its weights."""
    dtype = next(model.parameters()).dtype
    return model(**_as_dtype(inputs.arguments, dtype), return_dict=False)[0]


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

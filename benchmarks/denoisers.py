"""What the benchmarks of speed run: Stable Diffusion 1.5's UNet and smaller ones of its shape, with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from side_by_side import Comparison

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.denoisers.prepare import DenoiserInputs

# Stable Diffusion 1.5; 0.6 of its channels and half of its heads (of 48 channels, as its 40) at 32×32, which two CPU
# cores can run; and one that only tries the code. With all eight heads, the softmax over scores, whose number no width
# changes, would be a sixth of the smaller model's time.
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "cpu": {
        "sample_size": 32,
        "block_out_channels": (192, 384, 768, 768),
        "attention_head_dim": 4,
        "cross_attention_dim": 768,
    },
    "quick": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}

# Standard deviation of the logarithm of the groups' shares in equation 5, as the Taylor scores of small trained models
# have it. Random weights would make all branches of a block matter alike.
UNEVENNESS = 0.3


def make_denoiser(comparison: Comparison, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """The largest of `SHAPES` that suits the comparison, on its device, in eval mode."""
    torch.manual_seed(0)
    with comparison.device:
        denoiser = UNet2DConditionModel(**SHAPES["quick" if comparison.quick else comparison.device.type])
    dtype = dtype or comparison.dtype
    return denoiser.eval() if dtype is denoiser.dtype else denoiser.to(dtype).eval()


def make_supernet(
    denoiser: UNet2DConditionModel,
    sizes: Sequence[float],
    alignment: int = 8,
    criterion: str = "magnitude",
    min_keep: float = 0.25,
    unevenness: float = UNEVENNESS,
) -> Supernet:
    """The denoiser as a supernet, in place; its channels ranked by a criterion that needs no data."""
    groups = find_channel_groups(denoiser)
    scores = score_channels(denoiser, groups, criterion=criterion)
    generator = torch.Generator().manual_seed(0)
    for name, score in scores.items():
        scores[name] = score * math.exp(unevenness * torch.randn((), generator=generator).item())
    subnets = allocate(denoiser, groups, scores, sizes, min_keep=min_keep, alignment=alignment)
    return Supernet(denoiser, groups, scores, subnets)


def random_batch(denoiser: UNet2DConditionModel, batch_size: int) -> DenoiserInputs:
    """Noise in the place of noisy latents, captions and targets."""
    arguments = example_inputs(denoiser, batch_size)
    for name in ("sample", "encoder_hidden_states"):
        arguments[name] = torch.randn_like(arguments[name])
    arguments["timestep"] = torch.randint_like(arguments["timestep"], 1000)
    return DenoiserInputs(
        arguments, torch.randn_like(arguments["sample"]), torch.ones(batch_size, device=denoiser.device)
    )

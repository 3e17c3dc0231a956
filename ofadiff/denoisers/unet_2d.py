"""UNets of pixels: unconditional, or conditioned on classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ofadiff.denoisers.kind import CLASSES, DIFFUSION, Config, DenoiserKind
from ofadiff.denoisers.zeros import Zeros, sample_size


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `UNet2DModel`."""
    inputs = {"sample": zeros(model.config.in_channels, *sample_size(model)), "timestep": zeros.whole()}
    if model.config.num_class_embeds is not None:
        inputs["class_labels"] = zeros.whole()
    return inputs


def arguments(config: Config, sample: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `UNet2DModel`, with the labels if there are some."""
    labels = {"class_labels": encoded["class_labels"]} if "class_labels" in encoded else {}
    return {"sample": sample, "timestep": timesteps, **labels}


def classes(model: Any) -> float | None:
    """How many classes there are embeddings of."""
    return None if model.class_embedding is None else model.config.num_class_embeds or math.inf


def divisor(config: Config) -> int:
    """How often the sides are halved, as a factor."""
    return 2 ** (len(config["block_out_channels"]) - 1)


UNET_2D = DenoiserKind(
    "UNet2DModel",
    example_inputs,
    pixels_as="unet",
    condition=CLASSES,
    arguments=arguments,
    classes=classes,
    forward_processes=(DIFFUSION,),
    divisor=divisor,
    learned_variance=False,
    training_defaults={"tracker_project_name": "ofadiff-ddpm", "validation_inference_steps": 50},
)

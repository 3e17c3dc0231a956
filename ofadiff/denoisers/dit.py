"""DiT: transformers conditioned on classes, of latents or of pixels."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ofadiff.denoisers.kind import CLASSES, DIFFUSION, Config, DenoiserKind
from ofadiff.denoisers.zeros import Zeros, sample_size


def example_inputs(model: nn.Module, zeros: Zeros) -> dict[str, Any]:
    """Keyword arguments of a `DiTTransformer2DModel`."""
    return {
        "hidden_states": zeros(model.config.in_channels, *sample_size(model)),
        "timestep": zeros.whole(),
        "class_labels": zeros.whole(),
    }


def arguments(config: Config, sample: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `DiTTransformer2DModel`."""
    return {"hidden_states": sample, "timestep": timesteps, "class_labels": encoded["class_labels"]}


def classes(model: Any) -> float | None:
    """How many classes there are embeddings of, without the null class."""
    return model.config.num_embeds_ada_norm


def null_class(config: Config) -> int:
    """The label of no class, behind those of all others."""
    return config["num_embeds_ada_norm"]


def keep_labels(model: nn.Module) -> None:
    """Stops a model from leaving out labels by itself while it trains.

    Each block of diffusers' DiT draws its own, unlike any other block and unlike the teacher; `drop_labels` leaves them
    out for the whole model at once.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def drop_labels(labels: Tensor, seeds: Tensor, null_class: int, class_dropout_prob: float) -> Tensor:
    """Labels, `(N,)`, with some replaced by the null class; each sample's seed decides."""
    dropped = [random.Random(f"{seed} label").random() < class_dropout_prob for seed in seeds.tolist()]
    return labels.masked_fill(torch.tensor(dropped, device=labels.device), null_class)


DIT = DenoiserKind(
    "DiTTransformer2DModel",
    example_inputs,
    components={"DiTPipeline": "transformer"},
    pixels_as="unet",
    condition=CLASSES,
    arguments=arguments,
    classes=classes,
    null_class=null_class,
    begin_training=keep_labels,
    forward_processes=(DIFFUSION,),
    fixed_size=True,
    split_alone=("CombinedTimestepLabelEmbeddings",),  # the output takes that of the first block
    training_defaults={"tracker_project_name": "ofadiff-dit", "validation_inference_steps": 50},
)

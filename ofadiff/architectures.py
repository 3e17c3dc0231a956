"""Which of the installed diffusers' denoisers can be compressed, and how far."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from ofadiff.allocation.width_ladders import ladder
from ofadiff.channels import ChannelGroup, slices_by_module
from ofadiff.denoisers.pipelines import is_denoiser
from ofadiff.denoisers.table import trainable_kinds
from ofadiff.profiling.cost import count_parameters, unit_parameters
from ofadiff.unet_elastic import elastic_parameters, find_channel_groups

# What a class needs to be built and has no default for, as in the checkpoints that were published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [4096, 4096],
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": [*range(32), *[31] * 16],
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40},
    "LatteTransformer3DModel": {
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "attention_bias": True,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "caption_channels": 4096,
    },
    "LuminaNextDiT2DModel": {"num_layers": 24, "num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"type": "su", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
    },
}

# Classes that tests/recordings/test_any_pipeline.py compresses end to end, by name; test_proven.py beside it compares.
PROVEN_BY_RECORDING = (
    "AudioLDM2UNet2DConditionModel",
    "AuraFlowTransformer2DModel",
    "ChromaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "HunyuanDiT2DModel",
    "LTXVideoTransformer3DModel",
    "LatteTransformer3DModel",
    "Lumina2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "StableAudioDiTModel",
    "UNet2DConditionModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)


@dataclass(frozen=True)
class Architecture:
    """What compression can do to one class of denoisers, at its default configuration.

    Attributes:
        name: The class.
        params: Parameters.
        elastic_share: Fraction of the parameters in layers that can be cut.
        smallest_size: Fraction of the parameters that the smallest subnet keeps.
        rigid: Kinds of blocks whose layers stay as they are, with their share of the parameters, largest first; those
            under 2 % are left out.
        skipped: Why blocks of a known kind are not cut, or the class has none; empty if nothing is skipped.
        proven: How tests compress the class end to end, see `ways_proven`.
    """

    name: str
    params: int
    elastic_share: float
    smallest_size: float
    rigid: dict[str, float]
    skipped: str
    proven: tuple[str, ...] = ()


def architectures(min_keep: float = 0.25) -> list[Architecture]:
    """Every denoiser class of the installed diffusers, built at its default configuration without any memory.

    A class without a complete default configuration gets what its published checkpoint says.

    Args:
        min_keep: Smallest share of its units that a group keeps, in [0, 1]; see `allocate`.

    Returns:
        One row per class, by name.

    Example:
        >>> next(row.elastic_share for row in architectures() if row.name == "SanaTransformer2DModel")
        0.9733
    """
    return [_architecture(model_class, min_keep) for model_class in denoiser_classes()]


def denoiser_classes() -> list[type[ModelMixin]]:
    """The denoiser classes that the installed diffusers exports, by name."""
    exported: Iterator[Any] = (getattr(diffusers, name, None) for name in sorted(dir(diffusers)))
    return [found for found in exported if is_denoiser(found)]


def ways_proven(name: str) -> tuple[str, ...]:
    """How tests compress a class end to end: `"a family"`, trained on images; `"recording"`; both, or neither."""
    families = {kind.model for kind in trainable_kinds()}
    ways = {"a family": families, "recording": PROVEN_BY_RECORDING}
    return tuple(way for way, proven in ways.items() if name in proven)


def _architecture(model_class: type[ModelMixin], min_keep: float) -> Architecture:
    name = model_class.__name__
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(**PUBLISHED.get(name, {}))
    except (TypeError, ValueError) as error:
        return Architecture(name, 0, 0.0, 1.0, {}, f"cannot be built at its default configuration: {error}")
    params = count_parameters(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            groups, skipped = find_channel_groups(model), ""
        except ValueError as error:
            groups, skipped = [], str(error)
    for warning in caught:
        skipped = str(warning.message).partition("; ")[2]
    owned = unit_parameters(model, groups)
    dropped = sum(owned[group.name] * (group.width - ladder(group, min_keep, alignment=8)[0]) for group in groups)
    share = elastic_parameters(model, groups) / params
    rigid = _rigid_blocks(model, groups)
    return Architecture(name, params, share, 1 - dropped / params, rigid, skipped, ways_proven(name))


def _rigid_blocks(model: nn.Module, groups: list[ChannelGroup]) -> dict[str, float]:
    """Share of the parameters that no group cuts, by the class of the block that holds them."""
    total = count_parameters(model)
    modules = dict(model.named_modules())
    cut = slices_by_module(groups)
    shares: dict[str, float] = {}
    for name, module in modules.items():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own and name not in cut:
            block = name.rpartition(".")[0]
            while isinstance(modules[block], (nn.ModuleList, nn.Sequential)):
                block = block.rpartition(".")[0]
            kind = type(modules[block]).__name__
            shares[kind] = shares.get(kind, 0.0) + own / total
    return {kind: share for kind, share in sorted(shares.items(), key=lambda entry: -entry[1]) if share >= 0.02}

"""A LoRA to be trained on one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin

from ofadiff.channels import ChannelGroup
from ofadiff.layers import is_adaptable


def add_lora(
    model: ModelMixin,
    groups: Sequence[ChannelGroup],
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Freezes an extracted model and puts a LoRA into it.

    Args:
        model: The extracted model.
        groups: Channel groups of the full model that the size has cut.
        rank: Rank of the LoRA.
        alpha: Its scale times its rank; the rank by default.
        targets: Ends of the names of the layers that get it; by default every layer that the size has cut.
        seed: Seed of its initial weights.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra: peft is needed for training only

    torch.manual_seed(seed)
    model.requires_grad_(False)
    empty = [name.rpartition(".")[0] for name, parameter in model.named_parameters() if not parameter.numel()]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,  # type: ignore[arg-type]  # peft scales by any number
        target_modules=list(targets or cut_layers(model, groups)),
        exclude_modules=empty or None,  # dropped branches
    )
    inject_adapter_in_model(config, model)


def cut_layers(model: ModelMixin, groups: Sequence[ChannelGroup]) -> list[str]:
    """Names, within their blocks, of the linear maps and convolutions that lose channels: `conv1`, `to_q`, ….

    They are where a size differs from the full model, so where its loss can be made up for.
    """
    slices = ((group, part) for group in groups for part in group.slices)
    names = {
        part.module.removeprefix(f"{group.block}.")
        for group, part in slices
        if is_adaptable(model.get_submodule(part.module))
    }
    return sorted(names)

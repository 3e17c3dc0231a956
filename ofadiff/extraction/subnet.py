"""Cuts a subnet out of a supernet's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin

from ofadiff.channels import ChannelGroup, active_part
from ofadiff.cutting import kept_by_module
from ofadiff.extraction.extracted_model import empty_extracted_model


@torch.no_grad()
def extract(
    model: ModelMixin, groups: Sequence[ChannelGroup], widths: dict[str, int], basis: dict[str, torch.Tensor]
) -> ModelMixin:
    """Cuts a subnet out of the full weights.

    Args:
        model: The denoiser with its full parameters, elastic or stock; unchanged.
        groups: Its channel groups.
        widths: Units that every group keeps.
        basis: Basis that the full weights are in, which adapters of the original have to pass through.

    Returns:
        A stand-alone copy in eval mode, of class `OFA<DiffusersClass>`, with `model`'s device, dtype and memory format.

    Raises:
        ValueError: If the weights are not there, because they are offloaded.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model's weights are offloaded; extract before offloading, or load with size= instead")
    small = empty_extracted_model(type(model), dict(model.config), widths)
    kept = kept_by_module(groups, widths)
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, name = key.rpartition(".")
        state[key] = active_part(tensor, name, kept.get(module, ())).clone()
    small.load_state_dict(state, assign=True, strict=True)
    # Buffers that no state dict holds were made on the CPU, in float32.
    buffers = dict(model.named_buffers())
    for name, buffer in small.named_buffers():
        buffer.data = buffers[name].detach().clone()
    small.ofa_basis = dict(basis)
    return small

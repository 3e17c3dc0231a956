"""Channel groups of the values' offsets, where rotary embeddings fix everything else of an attention."""

from __future__ import annotations

from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.unet_elastic.attention_layers import OUTPUTS, attention_kind, check_processor, layers_of
from ofadiff.unet_elastic.heads import head_groups


def value_groups(name: str, attn: nn.Module, stage: str) -> list[ChannelGroup]:
    """The group of the values' offsets, the same in every head, where rotary embeddings differ from head to head.

    Queries and keys then keep their width, and heads cannot change places.

    Raises:
        UnsupportedBlockError: If its processor is not the class's own or holds weights.
    """
    check_processor(attn)
    layers = layers_of(attn)
    head_dim = layers["to_v"].out_features // attn.heads
    writers = [
        Slice(f"{name}.{layer}", "out", head_dim, 1, attn.heads, basis="value_output")
        for layer in ("to_v", "add_v_proj")
        if layer in layers
    ]
    readers = [
        Slice(f"{name}.{layer}", "in", head_dim, 1, attn.heads, basis="value_output", dual=True)
        for layer in OUTPUTS
        if layer in layers
    ]
    return [ChannelGroup(name, attention_kind(name, attn), stage, (*writers, *readers))]


def text_head_or_value_groups(name: str, attn: nn.Module, stage: str) -> list[ChannelGroup]:
    """Heads of the text attention `attn2`, which has no rotary embeddings; values' offsets of every other attention."""
    return head_groups(name, attn, stage) if name.endswith("attn2") else value_groups(name, attn, stage)

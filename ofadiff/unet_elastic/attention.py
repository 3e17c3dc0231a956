"""Channel groups of `Attention`: queries, keys and values write, the output projections read."""

from __future__ import annotations

from typing import Literal

from diffusers.models.attention_processor import Attention
from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.unet_elastic.attention_layers import OUTPUTS, WHOLE_HEADS, attention_kind, layers_of
from ofadiff.unet_elastic.dropped_attention import droppable
from ofadiff.unet_elastic.heads import head_group
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError

# Processors that take the head dimension as they find it, and have nothing between projections and products but q/k
# norms, if there are any: the unit is one offset, the same in every head.
OFFSETS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "JointAttnProcessor2_0",
    "SanaAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XFormersJointAttnProcessor",
}
# Processors that take the heads' width from `out_dim`.
READ_OUT_DIM = {"CosmosAttnProcessor2_5", "OmniGenAttnProcessor2_0"}


def attention_groups(name: str, attn: Attention, stage: str) -> list[ChannelGroup]:
    """The head-dimension or head group of an `Attention`.

    None for one without output projection: that belongs to the block around it.

    Raises:
        UnsupportedBlockError: If its projections are fused, its processor hard-codes the width or is not known, or a
            layer of it is not.
    """
    processor = type(attn.processor).__name__
    if processor not in OFFSETS | WHOLE_HEADS:
        raise UnsupportedBlockError(f"no rule covers its processor {processor}")
    if attn.fused_projections:
        raise UnsupportedBlockError("its projections are fused; call unfuse_qkv_projections() first")
    layers = layers_of(attn)
    readers = [f"{name}.{layer}" for layer in OUTPUTS if layer in layers]
    if not readers:
        return []
    if processor in WHOLE_HEADS or attn.norm_q is not None or attn.inner_kv_dim != attn.inner_dim:
        more = {"out_dim": attn.out_dim} if processor in READ_OUT_DIM else {}
        return [head_group(name, attn, stage, attn.inner_dim, readers, more)]

    head_dim = attn.inner_dim // attn.heads

    def part(layer: str, axis: Literal["out", "in"], basis: str, dual: bool, scaled: bool = False) -> list[Slice]:
        here = [Slice(f"{name}.{layer}", axis, head_dim, 1, attn.heads, 0, scaled, basis, dual)]
        return here if layer in layers else []

    slices = (
        *part("to_q", "out", "query_key", False, attn.scale_qk),
        *part("add_q_proj", "out", "query_key", False, attn.scale_qk),
        *part("to_k", "out", "query_key", True),
        *part("add_k_proj", "out", "query_key", True),
        *part("to_v", "out", "value_output", False),
        *part("add_v_proj", "out", "value_output", False),
        *part("to_out.0", "in", "value_output", True),
        *part("to_add_out", "in", "value_output", True),
    )
    resize = droppable(_resize_head_dim, type(attn))
    return [ChannelGroup(name, attention_kind(name, attn), stage, slices, resize, droppable=True)]


def _resize_head_dim(attn: nn.Module, group: ChannelGroup, units: int) -> None:
    attn.inner_dim = attn.inner_kv_dim = attn.heads * units
    if attn.scale_qk:
        # The processors that divide by the stored scale then agree with those that read the head dimension.
        attn.scale = units**-0.5

"""Channel groups of `Attention`: queries, keys and values write, the output projection reads."""

from __future__ import annotations

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError

# Processors that read the head dimension off the projections, so that any width runs.
PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


def attention_groups(name: str, attn: Attention, stage: str) -> list[ChannelGroup]:
    """The head-dimension group of an `Attention`; the unit is one offset, the same in every head.

    Raises:
        UnsupportedBlockError: If the block has added projections, grouped queries, q/k norms, fused projections or a
            processor that hard-codes the width.
    """
    if type(attn.processor) not in PROCESSORS:
        accepted = ", ".join(processor.__name__ for processor in PROCESSORS)
        raise UnsupportedBlockError(f"its processor {type(attn.processor).__name__} is none of {accepted}")
    if attn.fused_projections:
        raise UnsupportedBlockError("its projections are fused; call unfuse_qkv_projections() first")
    if attn.added_kv_proj_dim is not None:
        raise UnsupportedBlockError("it has added key and value projections")
    if attn.norm_q is not None or attn.norm_k is not None:
        raise UnsupportedBlockError("it normalises queries or keys over the head dimension")
    if attn.inner_kv_dim != attn.inner_dim:
        raise UnsupportedBlockError(f"its keys have {attn.inner_kv_dim} channels and its queries {attn.inner_dim}")

    head_dim = attn.inner_dim // attn.heads
    slices = (
        Slice(f"{name}.to_q", "out", head_dim, 1, attn.heads, keeps_softmax_scale=attn.scale_qk, basis="query_key"),
        Slice(f"{name}.to_k", "out", head_dim, 1, attn.heads, basis="query_key", dual=True),
        Slice(f"{name}.to_v", "out", head_dim, 1, attn.heads, basis="value_output"),
        Slice(f"{name}.to_out.0", "in", head_dim, 1, attn.heads, basis="value_output", dual=True),
    )
    kind = "cross_attention" if attn.is_cross_attention else "self_attention"
    return [ChannelGroup(name, kind, stage, slices, resize=_resize_head_dim)]


def _resize_head_dim(attn: nn.Module, group: ChannelGroup, units: int) -> None:
    attn.inner_dim = attn.inner_kv_dim = attn.heads * units
    if attn.scale_qk:
        # The processors that divide by the stored scale then agree with those that read the head dimension.
        attn.scale = units**-0.5

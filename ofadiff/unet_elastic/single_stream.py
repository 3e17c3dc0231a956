"""Channel groups of single-stream blocks: attention and feed-forward side by side, one layer reads both."""

from __future__ import annotations

from functools import partial

from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.unet_elastic.attention_layers import check_processor, scale_attributes
from ofadiff.unet_elastic.heads import head_group
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError


def single_stream_groups(name: str, block: nn.Module, stage: str) -> list[ChannelGroup]:
    """Heads and neurons of a block whose `proj_out` reads the attention's channels and then those of `proj_mlp`.

    Raises:
        UnsupportedBlockError: If the attention has a layer that no rule covers, a processor that is not its own, or
            something besides `proj_out` reads it.
    """
    attn, reader = block.attn, f"{name}.proj_out"
    check_processor(attn)
    neurons = block.proj_out.in_features - attn.inner_dim
    slices = (
        Slice(f"{name}.proj_mlp", "out", neurons, repeats=block.proj_mlp.out_features // neurons),
        Slice(reader, "in", neurons, start=attn.inner_dim),
    )
    full = {"mlp_hidden_dim": neurons} if "mlp_hidden_dim" in vars(block) else {}
    mlp = ChannelGroup(name, "feed_forward", stage, slices, partial(scale_attributes, full=full), droppable=True)
    if "cross_attn" in dict(block.named_children()):
        raise UnsupportedBlockError("a text attention reads and writes the heads of its attention", [mlp])
    return [head_group(f"{name}.attn", attn, stage, attn.inner_dim, [reader]), mlp]


def fused_single_stream_groups(name: str, attn: nn.Module, stage: str) -> list[ChannelGroup]:
    """Heads and neurons of an attention whose `to_qkv_mlp_proj` makes q, k, v and the feed-forward's neurons at once.

    Raises:
        UnsupportedBlockError: If its processor is not its own.
    """
    check_processor(attn)
    heads, inner, neurons = attn.heads, attn.inner_dim, attn.mlp_hidden_dim
    writer, reader = f"{name}.to_qkv_mlp_proj", f"{name}.to_out"
    head_slices = (Slice(writer, "out", heads, inner // heads, repeats=3), Slice(reader, "in", heads, inner // heads))
    neuron_slices = (
        Slice(writer, "out", neurons, repeats=attn.mlp_mult_factor, start=3 * inner),
        Slice(reader, "in", neurons, start=inner),
    )
    resize_heads = partial(scale_attributes, full={"heads": heads, "inner_dim": inner})
    resize_neurons = partial(scale_attributes, full={"mlp_hidden_dim": neurons})
    return [
        ChannelGroup(name, "self_attention", stage, head_slices, resize_heads),
        ChannelGroup(f"{name}:neurons", "feed_forward", stage, neuron_slices, resize_neurons, droppable=True),
    ]

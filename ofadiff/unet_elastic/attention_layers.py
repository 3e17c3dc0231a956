"""What attentions call their layers and widths, over all of diffusers, and what their processors allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.normalization import RMSNorm
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError

# What an attention calls its layers, over all of diffusers. Rows of a fused projection repeat the layout.
QUERIES = ("to_q", "add_q_proj", "to_q_t", "q_img", "to_query", "to_gate")
KEYS_AND_VALUES = (
    *("to_k", "to_v", "add_k_proj", "add_v_proj", "to_k_t", "to_v_t", "k_img", "v_img", "to_key", "to_value"),
    *("to_kv", "txt_kv_proj"),
)
FUSED = ("to_qkv", "img_attn_qkv", "txt_attn_qkv", "img_qkv_proj")
OUTPUTS = ("to_out.0", "to_out", "to_add_out", "to_out_t", "out_layer", "img_attn_proj", "txt_attn_proj")
DROPPABLE_OUTPUTS = {"to_out.0", "to_out", "to_add_out", "out_layer"}
QUERY_NORMS = (
    *("norm_q", "norm_added_q", "q_norm", "query_norm", "q_rms_norm", "q_rms_norm_t", "q_img_norm"),
    *("img_attn_q_norm", "txt_attn_q_norm"),
)
KEY_NORMS = (
    *("norm_k", "norm_added_k", "k_norm", "key_norm", "k_rms_norm", "k_rms_norm_t", "k_img_norm"),
    *("img_attn_k_norm", "txt_attn_k_norm"),
)

# Layers before the projections, on the residual stream.
INPUT_NORMS = ("group_norm", "spatial_norm", "norm_cross", "pre_norm_q", "pre_norm_kv")

# What an attention remembers of its width, in proportion to its heads.
HEADS = ("heads", "num_heads", "num_attention_heads")
KEY_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
WIDTHS = (*HEADS, *KEY_HEADS, "sliceable_head_dim", "inner_dim", "inner_kv_dim", "kv_inner_dim")

# Processors of the class `Attention` with rotary embeddings, or whose attention is linear: the unit is a whole head.
WHOLE_HEADS = {
    "AllegroAttnProcessor2_0",
    "AuraFlowAttnProcessor2_0",
    "BriaAttnProcessor",
    "CogVideoXAttnProcessor2_0",
    "CogView4AttnProcessor",
    "CosmosAttnProcessor2_0",
    "CosmosAttnProcessor2_5",
    "DreamLiteAttnProcessor2_0",
    "EasyAnimateAttnProcessor2_0",
    "GlmImageAttnProcessor",
    "HiDreamAttnProcessor",
    "HunyuanAttnProcessor2_0",
    "HunyuanImageAttnProcessor",
    "HunyuanVideo15AttnProcessor2_0",
    "HunyuanVideoAttnProcessor2_0",
    "Lumina2AttnProcessor2_0",
    "NucleusMoEAttnProcessor2_0",
    "OmniGenAttnProcessor2_0",
    "QwenDoubleStreamAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor3_0",
    "StableAudioAttnProcessor2_0",
    "ZSingleStreamAttnProcessor",
}

# Attentions that put two streams together in ways of their own, and those that were not tried: they keep a head.
NOT_DROPPABLE = {
    "CogVideoXAttnProcessor2_0",
    "CogView4AttnProcessor",
    "Cosmos3AttnProcessor",
    "GlmImageAttnProcessor",
    "Kandinsky6SRAttnProcessor",
    "MiniMaxMusic3DepthAttnProcessor",
    "RFD4ProteinaPairAttnProcessor",
    "SanaWMCrossAttnProcessor",
    "SanaWMLTX2AudioVideoAttnProcessor",
    "SanaWMLTX2PerturbedAttnProcessor",
    "SanaWMLTX2RefinerAttnProcessor",
    "WanAnimate2AttnProcessor",
}

# Norms that have a width even where they have no weights.
_NORMS = (nn.LayerNorm, nn.RMSNorm, RMSNorm)


def check_processor(attn: nn.Module) -> None:
    """Raises UnsupportedBlockError unless the processor is made for such an attention and has no weights of its own.

    An attention without one, whose own forward attends, passes. Projections that are fused are refused too: the
    processor then reads others than those that would be cut.
    """
    if vars(attn).get("fused_projections"):
        raise UnsupportedBlockError("its projections are fused; call unfuse_qkv_projections() first")
    if processor_of(attn) is None:
        return
    processor = type(processor_of(attn))
    known = processor.__module__ == type(attn).__module__ or processor.__name__ in WHOLE_HEADS
    if not known or issubclass(processor, nn.Module):
        raise UnsupportedBlockError(f"its processor {processor.__name__} is none of {type(attn).__name__}'s own")


def processor_of(attn: nn.Module) -> Any:
    """An attention's processor; None where it has none, because its own forward attends."""
    return vars(attn).get("processor", attn._modules.get("processor"))


def key_heads(attn: nn.Module, head_dim: int) -> int:
    """How many heads the keys have: fewer than the queries where queries are grouped."""
    layers = layers_of(attn)
    for layer in ("to_k", "to_key"):
        if layer in layers:
            return layers[layer].out_features // head_dim
    state = vars(attn)
    return next(state[attribute] for attribute in (*KEY_HEADS, *HEADS) if attribute in state)


def attention_kind(name: str, attn: nn.Module) -> str:
    """`"cross_attention"` or `"self_attention"`, as the attention says, or else its name."""
    cross = vars(attn).get("is_cross_attention", "cross" in name or name.endswith("attn2"))
    return "cross_attention" if cross else "self_attention"


def scale_attributes(block: nn.Module, group: ChannelGroup, units: int, full: Mapping[str, int]) -> None:
    """Sets what a block remembers of its width, in proportion to the units kept."""
    for attribute, value in full.items():
        setattr(block, attribute, value * units // group.width)


def layers_of(attn: nn.Module) -> dict[str, nn.Module]:
    """An attention's layers with a width: those that own parameters, and norms without any."""
    return {
        name: module
        for name, module in attn.named_modules()
        if name and (next(module.parameters(recurse=False), None) is not None or isinstance(module, _NORMS))
    }


def width_of(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, RMSNorm):
        return module.dim[-1]
    if isinstance(module, _NORMS):
        return module.normalized_shape[-1]
    return next(module.parameters(recurse=False)).shape[-1]

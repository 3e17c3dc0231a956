"""Channel groups of attentions whose head dimension is fixed: whole heads, shared by every stream of the attention.

Rotary embeddings and norms over the head dimension fix it. A norm over all heads follows them; two streams that attend
to each other share them; under grouped queries a unit is one key head with the query heads that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from ofadiff.channels import ChannelGroup, Resize, Slice
from ofadiff.unet_elastic.attention_layers import (
    DROPPABLE_OUTPUTS,
    FUSED,
    HEADS,
    INPUT_NORMS,
    KEY_NORMS,
    KEYS_AND_VALUES,
    NOT_DROPPABLE,
    OUTPUTS,
    QUERIES,
    QUERY_NORMS,
    WIDTHS,
    attention_kind,
    check_processor,
    key_heads,
    layers_of,
    processor_of,
    scale_attributes,
    width_of,
)
from ofadiff.unet_elastic.dropped_attention import droppable
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError


def head_groups(name: str, attn: nn.Module, stage: str) -> list[ChannelGroup]:
    """The group of an attention's heads. None for one without output projection: that belongs to the block around it.

    Raises:
        UnsupportedBlockError: If its processor is not the class's own or holds weights, it has a layer that no rule
            covers, or its shapes do not fit its heads.
    """
    outputs = [layer for layer in OUTPUTS if layer in layers_of(attn)]
    if not outputs:
        return []
    check_processor(attn)
    inner = attn.get_submodule(outputs[0]).in_features
    return [head_group(name, attn, stage, inner, [f"{name}.{output}" for output in outputs])]


def head_group(
    name: str, attn: nn.Module, stage: str, inner: int, readers: list[str], more: Mapping[str, int] | None = None
) -> ChannelGroup:
    """The heads of an attention as one group.

    Args:
        name: Dotted name of the attention.
        attn: The attention.
        stage: Stage of the group.
        inner: Channels of all its heads together.
        readers: Dotted names of the layers whose first `inner` columns read the heads.
        more: Further attributes that grow with the heads, with their values at full width.

    Raises:
        UnsupportedBlockError: If the attention has a layer or parameter that no rule covers, or shapes that do not fit
            its heads.
    """
    state = vars(attn)
    heads = next(state[attribute] for attribute in HEADS if attribute in state)
    head_dim = inner // heads
    units = key_heads(attn, head_dim)
    if units == 1 or heads % units:
        raise UnsupportedBlockError(f"its {heads} query heads share {units} key heads")
    for parameter, _ in attn.named_parameters(recurse=False):
        raise UnsupportedBlockError(f"no rule covers its parameter {parameter}")
    queries = heads // units * head_dim
    slices = []
    for layer, module in layers_of(attn).items():
        channels = _channels_of(layer, queries, head_dim)
        length = width_of(module)
        over_one_head = layer in (*QUERY_NORMS, *KEY_NORMS) and length == head_dim
        if channels is None or over_one_head:
            continue
        if length % (units * channels) or (layer in FUSED and queries != head_dim):
            raise UnsupportedBlockError(f"its layer {layer} is {length} wide, which its {heads} heads do not explain")
        slices.append(Slice(f"{name}.{layer}", "out", units, channels, length // (units * channels)))
    slices += [Slice(reader, "in", units, queries) for reader in readers]
    full = {attribute: state[attribute] for attribute in WIDTHS if attribute in state}
    resize: Resize = partial(scale_attributes, full={**full, **(more or {})})
    outputs = [layer for layer in OUTPUTS if layer in layers_of(attn)]
    can_drop = type(processor_of(attn)).__name__ not in NOT_DROPPABLE and set(outputs) <= DROPPABLE_OUTPUTS
    if can_drop:
        resize = droppable(resize, type(attn))
    return ChannelGroup(name, attention_kind(name, attn), stage, tuple(slices), resize, can_drop)


def _channels_of(layer: str, queries: int, keys: int) -> int | None:
    """Channels that a unit has in a layer; None where units have none.

    Args:
        layer: Name of the layer in the attention.
        queries: Channels of the query heads of a unit.
        keys: Channels of its key head.

    Raises:
        UnsupportedBlockError: If no rule covers the layer.
    """
    if layer in (*QUERIES, *FUSED, *QUERY_NORMS):
        return queries
    if layer in (*KEYS_AND_VALUES, *KEY_NORMS):
        return keys
    if layer in (*OUTPUTS, *INPUT_NORMS):
        return None
    raise UnsupportedBlockError(f"no rule covers its layer {layer}")

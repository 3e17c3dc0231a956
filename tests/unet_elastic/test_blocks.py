"""Blocks whose denoisers are too large, or too particular, to run as a whole in a test."""

from typing import Any

import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer, TemporalResnetBlock
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3AttentionBlock, Kandinsky3ResNetBlock
from torch import nn
from versions import since

from ofadiff import find_channel_groups
from ofadiff.unet_elastic import verify_groups


class OneBlock(nn.Module):
    """A denoiser of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, **inputs: Any) -> Any:
        return self.block(**inputs)


def new(path: str) -> Any:
    """A block of a denoiser that the oldest diffusers has not, or has without it."""
    return since(f"diffusers.models.{path}")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TOKENS = {"hidden_states": noise(2, 5, 32)}
IMAGE = {"x": noise(2, 32, 4, 4), "time_embed": noise(2, 16)}
ROTARY = (noise(5, 8), noise(5, 8))


def kandinsky3(*resample: bool | None) -> Kandinsky3ResNetBlock:
    return Kandinsky3ResNetBlock(32, 64, 16, norm_groups=8, up_resolutions=list(resample))


def dreamlite(separable: bool) -> nn.Module:
    block = new("unets.unet_dreamlite.ResnetBlock2DDreamLite")
    return block(in_channels=32, out_channels=32, temb_channels=16, groups=8, use_sep_conv=separable)


def cosmos2() -> nn.Module:
    attention, processor = (
        new(f"transformers.transformer_cosmos.{name}") for name in ("CosmosAttention", "CosmosAttnProcessor2_5")
    )
    return attention(query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm", processor=processor())


def wan_animate2() -> nn.Module:
    attention, processor = (
        new(f"transformers.transformer_wan_animate_2.{name}")
        for name in ("WanAnimate2Attention", "WanAnimate2CrossAttnProcessor")
    )
    return attention(32, 4, added_kv_proj_dim=16, processor=processor())


def minimax_music3() -> nn.Module:
    return new("transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthDecoderBlock")(32, 4, 24)


# Block, inputs, groups.
BLOCKS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "bria_fibo2_attention": (
        lambda: new("transformers.transformer_bria_fibo2.BriaFibo2Attention")(32, 4, 8),
        TOKENS,
        1,
    ),
    "bria_fibo2_feed_forward": (
        lambda: new("transformers.transformer_bria_fibo2.FeedForward")(32, 24),
        {"x": TOKENS["hidden_states"]},
        1,
    ),
    "cosmos2_attention": (
        cosmos2,
        {**TOKENS, "encoder_hidden_states": (noise(2, 6, 32), noise(2, 3, 32)), "attention_mask": (None, None)},
        1,
    ),
    "cosmos3_attention": (
        lambda: new("transformers.transformer_cosmos3.Cosmos3PackedMoTAttention")(32, 8, 4, 2, False, 1e-6),
        {"und_seq": noise(5, 32), "gen_seq": noise(5, 32), "rotary_emb": (*ROTARY, *ROTARY)},
        1,
    ),
    "cosmos3_feed_forward": (
        lambda: new("transformers.transformer_cosmos3.Cosmos3VLTextMLP")(32, 24),
        {"x": TOKENS["hidden_states"]},
        1,
    ),
    "dreamlite": (lambda: dreamlite(False), {"input_tensor": noise(2, 32, 4, 4), "temb": noise(2, 16)}, 1),
    "dreamlite_separable": (lambda: dreamlite(True), {"input_tensor": noise(2, 32, 4, 4), "temb": noise(2, 16)}, 1),
    "kandinsky3": (lambda: kandinsky3(None, None, None, None), IMAGE, 2),
    "kandinsky3_attention": (lambda: Kandinsky3AttentionBlock(32, 16, norm_groups=8, head_dim=8), IMAGE, 2),
    "kandinsky3_down": (lambda: kandinsky3(None, None, False, None), IMAGE, 1),
    "kandinsky3_up": (lambda: kandinsky3(None, True, None, None), IMAGE, 1),
    "minimax_h3_attention": (
        lambda: new("transformers.transformer_minimax_h3.MiniMaxH3Attention")(24, 4, 8),
        {"hidden_states": noise(2, 5, 24)},
        1,
    ),
    "minimax_music3_depth": (minimax_music3, TOKENS, 2),
    "rfd4_pair_transition": (
        lambda: new("transformers.transformer_rfd4_proteina.RFD4ProteinaPairTransition")(16),
        {"pairs": noise(2, 5, 5, 16), "pair_mask": torch.ones(2, 5, 5)},
        1,
    ),
    "rfd4_transition": (
        lambda: new("transformers.transformer_rfd4_proteina.RFD4ProteinaTransition")(16),
        {"values": noise(2, 5, 16), "mask": torch.ones(2, 5)},
        1,
    ),
    "sana_wm_feed_forward": (
        lambda: new("transformers.transformer_sana_wm.GLUMBConvTemp")(16, 24),
        {"hidden_states": noise(2, 32, 16), "HW": (2, 4, 4)},
        1,
    ),
    "temporal_convolution": (
        lambda: TemporalConvLayer(32, 32, norm_num_groups=8),
        {"hidden_states": noise(4, 32, 4, 4), "num_frames": 2},
        2,
    ),
    "temporal_resnet": (
        lambda: TemporalResnetBlock(64, 64, temb_channels=16),
        {"input_tensor": noise(2, 64, 2, 4, 4), "temb": noise(2, 2, 16)},
        1,
    ),
    "wan_animate2_attention": (
        wan_animate2,
        {**TOKENS, "encoder_hidden_states": noise(2, 6, 32), "encoder_hidden_states_image": noise(2, 3, 16)},
        1,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_group_is_exact_to_reorder_and_to_cut(name):
    make, inputs, count = BLOCKS[name]
    torch.manual_seed(0)
    model = OneBlock(make())
    for parameter in model.parameters():  # zero-initialised weights must count too
        if parameter.ndim < 2 or not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.any()), std=0.2)
    groups = find_channel_groups(model)
    assert len(groups) == count
    verify_groups(model, groups, inputs)

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_unet, random_inputs
from diffusers import AutoencoderTiny, ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlockCondNorm2D
from torch import nn

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.profiling.cost import count_parameters, unit_costs
from ofadiff.unet_elastic import FINDERS, elastic_parameters, verify_groups
from ofadiff.unet_elastic.feed_forward import neurons
from ofadiff.unet_elastic.resnet import condition_norm_resnet_groups


def test_every_group_is_exact_to_reorder_and_to_cut(unet):
    groups = find_channel_groups(unet)
    assert max(verify_groups(unet, groups, random_inputs(unet)).values()) < 1e-10


def test_groups_describe_the_blocks(unet):
    groups = {group.name: group for group in find_channel_groups(unet)}
    for name, group in groups.items():
        block = unet.get_submodule(name)
        internal = {
            "convolution": lambda block: block.conv2.in_channels,
            "self_attention": lambda block: block.to_out[0].in_features,
            "cross_attention": lambda block: block.to_out[0].in_features,
            "feed_forward": lambda block: block.net[2].in_features,
        }[group.kind](block)
        assert group.width * group.channels_per_unit == internal
        assert name.startswith(group.stage)


def test_a_wrong_group_is_refused():
    model = plain_unet()
    group = next(group for group in find_channel_groups(model) if group.kind == "convolution")
    # Without the norm that is carried along, reordering changes the function.
    nn.init.normal_(model.get_submodule(f"{group.name}.norm2").weight)
    wrong = dataclasses.replace(group, slices=tuple(part for part in group.slices if "norm2" not in part.module))
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.0 is no channel group: reordering"):
        verify_groups(model, [wrong], random_inputs(model))


class CondNormBlock(nn.Module):
    """A `ResnetBlockCondNorm2D` with the calling convention of a denoiser."""

    def __init__(self, norm: str, temb_channels: int) -> None:
        super().__init__()
        self.block = ResnetBlockCondNorm2D(
            in_channels=32, out_channels=64, temb_channels=temb_channels, groups=32, time_embedding_norm=norm
        )

    def forward(self, sample: torch.Tensor, temb: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.block(sample, temb),)


@pytest.mark.parametrize(("norm", "temb_shape"), [("ada_group", (2, 16)), ("spatial", (2, 16, 8, 8))])
def test_condition_norm_resnets(norm, temb_shape):
    torch.manual_seed(0)
    model = CondNormBlock(norm, 16)
    groups = condition_norm_resnet_groups("block", model.block, "block")
    inputs = {"sample": torch.randn(2, 32, 8, 8), "temb": torch.randn(temb_shape)}
    assert max(verify_groups(model, groups, inputs).values()) < 1e-10


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="AutoencoderTiny has no block that can be cut; known blocks are listed"):
        find_channel_groups(AutoencoderTiny())


def test_rigid_blocks_are_named():
    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        encoder_hid_dim=32,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.warns(UserWarning, match=r"of the parameters are elastic; .*AttnAddedKVProcessor2_0"):
        groups = find_channel_groups(model)
    assert {group.kind for group in groups} == {"convolution"}


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))


class OwnDenoiser(ModelMixin, ConfigMixin):
    """A denoiser that diffusers does not ship, as a user of the library has one."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(SwiGLU(), SwiGLU())

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (hidden_states + self.blocks(hidden_states),)


def test_a_model_of_one_s_own_needs_one_line_per_kind_of_block(monkeypatch):
    torch.manual_seed(0)
    model, inputs = OwnDenoiser().eval(), {"hidden_states": torch.randn(2, 5, 8)}
    finder = neurons("gate", "up", reader="down")
    monkeypatch.setitem(FINDERS, f"{SwiGLU.__module__}.{SwiGLU.__qualname__}", finder)
    groups = find_channel_groups(model)
    verify_groups(model, groups, inputs)
    scores = score_channels(model, groups, criterion="magnitude")
    supernet = Supernet(model, groups, scores, allocate(model, groups, scores, sizes=(0.5, 1.0), inputs=inputs))
    with supernet.at(0.5):
        assert torch.allclose(supernet.extract(0.5)(**inputs)[0], model(**inputs)[0], atol=1e-6)


STABLE_DIFFUSION = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize(
    ("config", "millions", "share"),
    [
        ({**STABLE_DIFFUSION, "cross_attention_dim": 768, "attention_head_dim": 8}, 859.5, 0.88),
        (
            {
                **STABLE_DIFFUSION,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            865.9,
            0.88,
        ),
        (SDXL, 2567.5, 0.97),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_real_sizes(config, millions, share):
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    groups = find_channel_groups(model)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)
    assert elastic_parameters(model, groups) / count_parameters(model) == pytest.approx(share, abs=0.005)


def test_stable_diffusion_1_5_has_the_paper_s_costs():
    with torch.device("meta"):
        model = UNet2DConditionModel(**STABLE_DIFFUSION, cross_attention_dim=768, attention_head_dim=8)
    groups = find_channel_groups(model)
    costs = unit_costs(model, groups)
    assert elastic_parameters(model, groups) / 1e6 == pytest.approx(756.7, abs=0.05)
    assert costs.macs / 1e9 == pytest.approx(402, abs=1)
    # Every internal width at a quarter: 292 M.
    quarter = costs.params - sum(costs.unit_params[group.name] * group.width * 3 / 4 for group in groups)
    assert quarter / 1e6 == pytest.approx(292, abs=2.5)

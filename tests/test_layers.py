"""Every elastic layer computes what the layer computes that was cut out of it."""

import copy

import pytest
import torch
from diffusers.models.normalization import GlobalResponseNorm, RMSNorm
from diffusers.models.unets import unet_stable_cascade
from torch import nn

from ofadiff.channels import Slice
from ofadiff.layers import ELASTIC, make_elastic, shrink

# Layer of eight channels, its input, which side of it is cut.
LAYERS = {
    "linear_rows": (lambda: nn.Linear(8, 8), (2, 8), "out"),
    "linear_columns": (lambda: nn.Linear(8, 8), (2, 8), "in"),
    "convolution_1d": (lambda: nn.Conv1d(8, 8, 3), (2, 8, 5), "in"),
    "convolution_2d": (lambda: nn.Conv2d(8, 8, 3), (2, 8, 5, 5), "out"),
    "convolution_3d": (lambda: nn.Conv3d(8, 8, 1), (2, 8, 2, 2, 2), "in"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5), "both"),
    "group_norm": (lambda: nn.GroupNorm(4, 8), (2, 8, 5), "both"),
    "group_norm_without_weights": (lambda: nn.GroupNorm(4, 8, affine=False), (2, 8, 5), "both"),
    "layer_norm": (lambda: nn.LayerNorm(8), (2, 8), "both"),
    "layer_norm_without_weights": (lambda: nn.LayerNorm(8, elementwise_affine=False), (2, 8), "both"),
    "rms_norm": (lambda: nn.RMSNorm(8, eps=1e-5), (2, 8), "both"),
    "rms_norm_without_weights": (lambda: nn.RMSNorm(8, elementwise_affine=False), (2, 8), "both"),
    "diffusers_rms_norm": (lambda: RMSNorm(8, 1e-5, bias=True), (2, 8), "both"),
    "diffusers_rms_norm_without_weights": (lambda: RMSNorm(8, 1e-5, elementwise_affine=False), (2, 8), "both"),
    "global_response_norm": (lambda: GlobalResponseNorm(8), (2, 3, 3, 8), "both"),
    "cascade_global_response_norm": (lambda: unet_stable_cascade.GlobalResponseNorm(8), (2, 3, 3, 8), "both"),
}
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, RMSNorm, GlobalResponseNorm)


def test_every_kind_of_layer_is_here():
    assert {type(make()) for make, _, _ in LAYERS.values()} == set(ELASTIC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_an_elastic_layer_equals_the_one_cut_out(name, dtype):
    make, shape, side = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    kept = ((Slice("layer", "in" if side == "in" else "out", units=2, channels=2, repeats=2), 1),)
    small, elastic = copy.deepcopy(layer), copy.deepcopy(layer)
    shrink(small, "layer", kept)
    make_elastic(elastic, "layer")
    input = torch.randn(shape, dtype=dtype)
    assert torch.equal(elastic(input), layer(input))

    elastic.kept = kept
    if name == "depthwise":
        elastic.groups = 4  # set by the block's own resize
    if side != "out":
        last = isinstance(layer, (*CHANNELS_LAST, unet_stable_cascade.GlobalResponseNorm))
        input = input.narrow(-1 if last else 1, 0, 4)
    assert torch.equal(elastic(input), small(input))
    assert type(small) is type(layer) and sum(p.numel() for p in small.parameters()) <= 0.6 * sum(
        p.numel() for p in layer.parameters()
    )

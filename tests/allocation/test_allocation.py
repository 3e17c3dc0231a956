import itertools

import pytest
import torch
from conftest import make_unet
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

from ofadiff import allocate, find_channel_groups, score_channels
from ofadiff.allocation.width_ladders import MIN_STEPS

SIZES = (0.4, 0.5, 0.65, 0.8, 0.9, 1.0)


@pytest.fixture
def parts(unet):
    groups = find_channel_groups(unet)
    return unet, groups, score_channels(unet, groups, criterion="random")


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_sizes_are_met_and_nest(parts, budget):
    unet, groups, scores = parts
    table = allocate(unet, groups, scores, sizes=SIZES, budget=budget)
    full = table.full_params if budget == "params" else table.full_macs
    reached = [(subnet.params if budget == "params" else subnet.macs) / full for subnet in table]
    assert reached == pytest.approx(SIZES, abs=0.005)
    for smaller, larger in itertools.pairwise(table):
        assert all(smaller.widths[name] <= larger.widths[name] for name in smaller.widths)
        assert smaller.params < larger.params and smaller.macs < larger.macs
    assert table[-1].widths == {group.name: group.width for group in groups}


def test_widths_are_aligned_and_not_below_the_floor(parts):
    unet, groups, scores = parts
    table = allocate(unet, groups, scores, sizes=(0.6, 1.0), min_keep=0.3, alignment=4)
    for group in groups:
        kept = table[0].widths[group.name]
        assert kept >= 0.3 * group.width
        if kept < group.width and group.width >= MIN_STEPS * group.step(4):
            assert kept * group.reader.channels % 4 == 0


def test_importance_decides_within_a_block():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = {group.name: torch.ones(group.width) for group in groups}
    favoured, rival = [g for g in groups if g.kind == "convolution" and g.stage == "mid_block"]
    scores[favoured.name] = scores[favoured.name] * 3
    widths = allocate(unet, groups, scores, sizes=(0.6,))[0].widths
    assert widths[favoured.name] > widths[rival.name]


def test_what_the_clip_takes_goes_to_other_groups():
    # One group holds all the importance of its block, so equation 5 as printed leaves the block at its floor elsewhere.
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = {group.name: torch.full((group.width,), 1e-6) for group in groups}
    scores[groups[0].name] = torch.ones(groups[0].width)
    printed = allocate(unet, groups, scores, sizes=(0.9,), budget="channels")
    exact = allocate(unet, groups, scores, sizes=(0.9,), budget="params")
    assert printed[0].params / printed.full_params < 0.895
    assert exact[0].params / exact.full_params == pytest.approx(0.9, abs=0.005)


def test_the_channel_budget_is_equation_5():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    P, P_0 = 0.6, 0.25
    widths = allocate(unet, groups, scores, sizes=(P,), budget="channels", min_keep=P_0)[0].widths
    for group in groups:
        block = [other for other in groups if other.stage == group.stage]
        I_hat = scores[group.name].sum() / sum(scores[other.name].sum() for other in block)
        C = max(min(I_hat * len(block) * P * group.width, group.width), P_0 * group.width)
        assert abs(widths[group.name] - C) <= 0.5 + 1e-5


def test_a_size_depends_on_no_size_above_it(parts):
    unet, groups, scores = parts
    alone = allocate(unet, groups, scores, sizes=(0.5,))
    among = allocate(unet, groups, scores, sizes=(0.5, 0.55, 1.0))
    assert alone[0.5] == among[0.5]


def test_bad_input():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    with pytest.raises(ValueError, match=r"size 0\.1 is not possible: .* smallest subnet has 0\.\d+ .*ask for 0\.\d+"):
        allocate(unet, groups, scores, sizes=(0.1, 1.0))
    with pytest.raises(ValueError, match=r"size is 1\.2; every size must lie in \(0, 1\]"):
        allocate(unet, groups, scores, sizes=(0.5, 1.2))
    with pytest.raises(ValueError, match="may appear once"):
        allocate(unet, groups, scores, sizes=(0.5, 0.5))
    with pytest.raises(ValueError, match="sizes is empty"):
        allocate(unet, groups, scores, sizes=())
    with pytest.raises(ValueError, match="budget is 'flops'; it must be one of params, macs, latency, channels"):
        allocate(unet, groups, scores, budget="flops")
    with pytest.raises(ValueError, match=r"min_keep is -0.1; it must be a number in \[0, 1\]"):
        allocate(unet, groups, scores, min_keep=-0.1)
    with pytest.raises(ValueError, match=r"have shape \(3,\); it must be \(8,\)"):
        allocate(unet, groups, {**scores, groups[0].name: torch.ones(3)})
    with pytest.raises(ValueError, match=r"sizes 0\.5 and 0\.50001 come to the same subnet"):
        allocate(unet, groups, scores, sizes=(0.5, 0.50001))
    with pytest.raises(ValueError, match="scores lack"):
        allocate(unet, groups, {})
    with pytest.raises(ValueError, match="finite and not negative"):
        allocate(unet, groups, {**scores, groups[0].name: torch.full((8,), float("nan"))})


def test_the_smallest_possible_size_that_an_error_names_is_possible():
    unet = make_unet("sdxl")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    with pytest.raises(ValueError, match="ask for") as error:
        allocate(unet, groups, scores, sizes=(0.05,))
    named = float(str(error.value).split("ask for ")[1].split()[0])
    assert allocate(unet, groups, scores, sizes=(named,))[0].size == named


@pytest.mark.parametrize(
    "transformer", [DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel]
)
def test_sizes_are_met_on_the_real_shapes_of_transformers(transformer):
    with torch.device("meta"):
        model = transformer()
    groups = find_channel_groups(model)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.width, generator=generator) for group in groups}
    table = allocate(model, groups, scores, sizes=(0.6, 0.8))
    assert [subnet.params / table.full_params for subnet in table] == pytest.approx([0.6, 0.8], abs=0.005)

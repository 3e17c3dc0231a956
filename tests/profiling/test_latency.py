"""Sizes in latency: with given costs, on a clock that counts MACs, and by the real clock, whatever it says."""

import itertools
import json
import math

import pytest
import torch
from conftest import make_unet, output, random_inputs
from tiny_transformers import tiny, tiny_inputs

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.allocation.width_ladders import ladders
from ofadiff.profiling.cost import unit_costs
from ofadiff.profiling.latency import LatencyCosts, latency_table, measure_latency_costs

pytestmark = pytest.mark.slow

SIZES = (0.55, 0.75, 0.9, 1.0)


@pytest.fixture
def parts(unet):
    groups = find_channel_groups(unet)
    return unet, groups, score_channels(unet, groups, criterion="random")


def given_costs(groups, min_keep=0.25, jump=0):
    """A millisecond and more for a group at full width; a group that keeps anything costs `jump` at once."""
    points = {}
    for index, group in enumerate(groups):
        rungs = ladders([group], min_keep)[group.name]
        points[group.name] = [
            (units, (units > 0) * jump + (index + 10) * 100_000 * units // group.width) for units in rungs
        ]
    return LatencyCosts(sum(points[group.name][-1][1] for group in groups) * 10 // 9, "a clock", points)


def test_sizes_in_latency_are_met_nest_and_remember_what_they_cost(parts):
    unet, groups, scores = parts
    costs = given_costs(groups)
    table = allocate(unet, groups, scores, SIZES, "latency", latencies=costs)
    assert table == allocate(unet, groups, scores, SIZES, "latency", latencies=costs)
    assert table.budget == "latency" and table.processor == "a clock" and table.full_latency_ms == costs.full / 1e6
    reached = [subnet.latency_ms / table.full_latency_ms for subnet in table]
    assert reached == pytest.approx(SIZES, abs=0.02) and all(map(float.__le__, reached, SIZES))
    for subnet in table:
        saved = sum(costs.of(g.name, g.width) - costs.of(g.name, subnet.widths[g.name]) for g in groups)
        assert subnet.latency_ms == (costs.full - saved) / 1e6
    for smaller, larger in itertools.pairwise(table):
        assert all(smaller.widths[name] <= larger.widths[name] for name in smaller.widths)
        assert smaller.latency_ms < larger.latency_ms
    assert table[-1].widths == {group.name: group.width for group in groups}


def test_a_size_below_the_smallest_subnet_is_an_error_that_names_what_is_possible():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    costs = given_costs(groups)
    with pytest.raises(
        ValueError, match=r"size 0\.2 is not possible: .* of the full model's latency; ask for"
    ) as error:
        allocate(unet, groups, scores, (0.2, 1.0), "latency", latencies=costs)
    named = float(str(error.value).split("ask for ")[1].split()[0])
    assert allocate(unet, groups, scores, (named,), "latency", latencies=costs)[0].size == named


def test_groups_that_cost_the_same_at_every_width_stay_full():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    costs = given_costs(groups)
    free = groups[0]
    points = {**costs.points, free.name: [(units, 50_000) for units, _ in costs.points[free.name]]}
    table = allocate(unet, groups, scores, (0.6,), "latency", latencies=LatencyCosts(costs.full, "a clock", points))
    assert table[0].widths[free.name] == free.width


def test_a_dropped_branch_costs_nothing_and_what_it_saves_goes_to_others():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    costs = given_costs(groups, min_keep=0, jump=300_000)
    assert all(costs.of(group.name, 0) == 0 for group in groups if group.droppable)
    table = allocate(unet, groups, scores, (0.3, 0.6, 1.0), "latency", min_keep=0, latencies=costs)
    assert 0 in table[0].widths.values() and table[0].latency_ms <= 0.3 * table.full_latency_ms
    with pytest.raises(ValueError, match=r"was timed with \d+ to \d+ units, not with 0"):
        allocate(unet, groups, scores, (0.3,), "latency", min_keep=0, latencies=given_costs(groups))


def test_other_budgets_remember_a_latency_only_if_it_was_measured():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    plain = allocate(unet, groups, scores, (0.6, 1.0))
    assert "latency" not in json.dumps(plain.to_dict())  # the file of other budgets is as it was
    timed = allocate(unet, groups, scores, (0.6, 1.0), latencies=given_costs(groups))
    assert [subnet.widths for subnet in timed] == [subnet.widths for subnet in plain]
    assert timed[0].latency_ms < timed[1].latency_ms == timed.full_latency_ms


def test_a_checkpoint_remembers_its_latencies(tmp_path):
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    subnets = allocate(unet, groups, scores, (0.6, 1.0), "latency", latencies=given_costs(groups))
    Supernet(unet, groups, scores, subnets).save_pretrained(tmp_path)
    loaded = Supernet.from_pretrained(tmp_path).subnets
    assert loaded == subnets and loaded[0.6].latency_ms == subnets[0.6].latency_ms and "ms on a clock" in repr(loaded)
    assert loaded.only(0.6).processor == "a clock" and loaded.only(0.6).full_latency_ms == subnets.full_latency_ms


MODELS = {"scale_shift": 0.25, "sd15": 0, "DiTTransformer2DModel": 0.25, "FluxTransformer2DModel": 0}  # with min_keep


def make(name):
    return (
        (tiny(name), tiny_inputs(name)) if name.endswith("Model") else (make_unet(name), random_inputs(make_unet(name)))
    )


@pytest.mark.parametrize(("name", "min_keep"), MODELS.items())
def test_on_a_clock_that_counts_macs_groups_cost_their_macs(name, min_keep, mac_clock):
    model, inputs = make(name)
    groups = find_channel_groups(model)
    macs = unit_costs(model, groups, inputs)
    costs = measure_latency_costs(model, groups, ladders(groups, min_keep), inputs)
    assert costs.full == macs.macs * 10**9
    for group in groups:
        for units in ladders(groups, min_keep)[group.name]:
            saved = costs.of(group.name, group.width) - costs.of(group.name, units)
            assert saved == pytest.approx((group.width - units) * macs.unit_macs[group.name] * 1e9, rel=1e-6)


def test_on_that_clock_sizes_are_met_by_whole_models(mac_clock):
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    subnets = allocate(unet, groups, scores, SIZES, "latency")
    assert [subnet.macs / subnets.full_macs for subnet in subnets] == pytest.approx(SIZES, abs=0.005)
    assert [subnet.widths for subnet in subnets] == [
        subnet.widths for subnet in allocate(unet, groups, scores, SIZES, "macs")
    ]
    supernet = Supernet(unet, groups, scores, subnets)
    measured = latency_table(supernet)
    assert list(measured) == ["full", "1", "0.9", "0.75", "0.55"]
    assert measured["full"] == subnets.full_macs
    assert [measured[f"{subnet.size:g}"] for subnet in subnets] == [subnet.macs for subnet in subnets]
    assert supernet.size == 1.0


@pytest.mark.parametrize("name", ["plain", "DiTTransformer2DModel"])
def test_measuring_gives_rising_times_and_leaves_the_model_as_it_was(name):
    model, inputs = make(name)
    model.train()
    before, state = output(model.eval(), inputs), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.train()
    kinds = [type(module) for module in model.modules()]
    groups = find_channel_groups(model)
    costs = measure_latency_costs(model, groups, ladders(groups), inputs)
    assert costs.full > 0 and costs.processor
    assert set(costs.points) == {group.name for group in groups}
    for group in groups:
        points = costs.points[group.name]
        assert points[0][0] == ladders(groups)[group.name][0] and points[-1][0] == group.width
        assert all(time >= 0 and math.isfinite(time) for _, time in points)
        times = [costs.of(group.name, units) for units in range(points[0][0], group.width + 1)]
        assert times == sorted(times)
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(output(model.eval(), inputs), before)


def test_what_cannot_be_measured_is_an_error():
    with torch.device("meta"):
        unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = {group.name: torch.ones(group.width) for group in groups}
    with pytest.raises(ValueError, match="weights are on the meta device or offloaded; latency is measured with"):
        allocate(unet, groups, scores, budget="latency")

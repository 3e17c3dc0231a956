"""Branches that a size does without: width 0 in allocation, elastic models, extraction and training."""

import copy
import itertools
import pickle

import pytest
import torch
from conftest import (
    MODELS,
    SIZES,
    make_dropping_supernet,
    make_unet,
    output,
    random_inputs,
    relative_error,
    squared_output_loss,
)
from diffusers.models.attention_processor import AttnProcessor
from tiny_transformers import tiny, tiny_inputs
from torch._dynamo.testing import CompileCounter

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.channels import check_widths
from ofadiff.cutting import shrink_model
from ofadiff.profiling.cost import count_macs, count_parameters
from ofadiff.unet_elastic.dropped_attention import DroppableAttention

pytestmark = pytest.mark.slow

TRANSFORMERS = ("DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel")


@pytest.fixture(params=[*MODELS, *TRANSFORMERS])
def dropping(request):
    """A supernet with `min_keep=0`, and inputs."""
    if request.param in MODELS:
        model = make_unet(request.param)
        return make_dropping_supernet(model), random_inputs(model)
    return make_dropping_supernet(tiny(request.param), (0.6, 0.8, 1.0)), tiny_inputs(request.param)


def test_a_small_size_drops_branches_and_everything_else_holds(dropping, tmp_path):
    supernet, inputs = dropping
    subnets = supernet.subnets
    assert set(subnets[0].dropped) and not subnets[-1].dropped
    assert set(subnets[0].dropped) <= {group.name for group in supernet.groups if group.droppable}
    for smaller, larger in itertools.pairwise(subnets):
        assert all(smaller.widths[name] <= larger.widths[name] for name in smaller.widths)
    supernet.save_pretrained(tmp_path / "supernet")
    reloaded = Supernet.from_pretrained(tmp_path / "supernet")
    for subnet in subnets:
        small = supernet.extract(subnet.size)
        assert count_parameters(small) == subnet.params
        with supernet.at(subnet.size) as model:
            expected = output(model, inputs)
        assert relative_error(output(small, inputs), expected) < 1e-5
        small.save_pretrained(tmp_path / "small")
        again = type(small).from_pretrained(tmp_path / "small")
        assert torch.equal(output(again, inputs), output(small, inputs))
        with reloaded.at(subnet.size) as model:
            assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_sizes_are_met(unet, budget):
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    scores = {name: score * 3 ** (number % 4) for number, (name, score) in enumerate(scores.items())}
    table = allocate(unet, groups, scores, sizes=SIZES, budget=budget, min_keep=0)
    full = table.full_params if budget == "params" else table.full_macs
    reached = [(subnet.params if budget == "params" else subnet.macs) / full for subnet in table]
    assert reached == pytest.approx(SIZES, abs=0.005)
    supernet = Supernet(unet, groups, scores, table)
    for subnet in table:
        with supernet.at(subnet.size):
            assert count_macs(unet) == subnet.macs


def test_what_is_kept_is_at_least_a_quarter(dropping):
    supernet, _ = dropping
    for group in supernet.groups:
        for subnet in supernet.subnets:
            width = subnet.widths[group.name]
            assert width == 0 or width >= group.width / 4


def test_without_any_branch_the_biases_are_left(unet):
    # The branch that remains when no weight reads its channels is what every reader's bias adds.
    inputs = random_inputs(unet)
    groups = find_channel_groups(unet)
    small = make_unet_copy(unet)
    shrink_model(small, groups, dict.fromkeys((group.name for group in groups), 0))
    for group in groups:
        for part in group.slices:
            if part.axis == "in":
                unet.get_submodule(part.module).weight.data.zero_()
    assert relative_error(output(small, inputs), output(unet, inputs)) < 1e-5
    kept = {name for name, parameter in small.named_parameters() if parameter.numel()}
    for group in groups:
        for part in group.slices:
            assert f"{part.module}.weight" not in kept
            assert (f"{part.module}.bias" in kept) <= (part.axis == "in")


def make_unet_copy(unet):
    copy = type(unet).from_config(unet.config).eval()
    copy.load_state_dict(unet.state_dict())
    return copy


def test_a_step_trains_what_is_left_and_nothing_else(unet):
    supernet = make_dropping_supernet(unet)
    unet.train()
    supernet.set_size("smallest")
    squared_output_loss(unet, random_inputs(unet)).mean().backward()
    widths = supernet.subnets[0].widths
    for group in supernet.groups:
        if widths[group.name] == 0:
            for part in group.slices:
                layer = unet.get_submodule(part.module)
                assert layer.weight.grad is None or not layer.weight.grad.any()
                assert part.axis == "out" or layer.bias is None or layer.bias.grad.any()
    assert unet.conv_in.weight.grad.any()


def test_autocast_gives_the_dtype_of_a_convolution():
    unet = make_unet("plain")
    supernet = make_dropping_supernet(unet)
    supernet.set_size("smallest")
    seen = []
    name = next(name for name in supernet.subnets[0].dropped if "resnets" in name)
    unet.get_submodule(name).conv2.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output(unet, random_inputs(unet))
    assert seen == [torch.bfloat16]


def test_no_processor_brings_a_dropped_attention_back():
    unet = make_unet("sd15")
    inputs = random_inputs(unet)
    supernet = make_dropping_supernet(unet)
    small = supernet.extract("smallest")
    expected = output(small, inputs)
    supernet.set_size("smallest")
    for model in (small, unet):
        model.set_attn_processor(AttnProcessor())
        assert relative_error(output(model, inputs), expected) < 1e-5
        model.set_attention_slice("max")
        assert relative_error(output(model, inputs), expected) < 1e-5
    supernet.set_size("largest")
    droppable = [module for module in unet.modules() if isinstance(module, DroppableAttention)]
    assert droppable and not any(module.dropped for module in droppable)


def test_copies_stay_dropped(dropping):
    supernet, inputs = dropping
    small = supernet.extract("smallest")
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(supernet.extract("smallest")))):
        assert torch.equal(output(copied, inputs), output(small, inputs))


def test_compiling_makes_one_graph_per_size():
    unet = make_unet("plain")
    supernet = make_dropping_supernet(unet)
    inputs = random_inputs(unet)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter)
    for size in ("smallest", "largest", "smallest"):
        supernet.set_size(size)
        assert relative_error(output(compiled, inputs), output(unet, inputs)) < 1e-5
    assert counter.frame_count == 2


def test_only_what_can_be_dropped_is(unet):
    groups = find_channel_groups(unet)
    widths = {group.name: group.width for group in groups}
    check_widths(groups, {**widths, groups[0].name: 0})
    with pytest.raises(ValueError, match="is -1 units; it must lie between 0 and"):
        check_widths(groups, {**widths, groups[0].name: -1})
    groups[0].droppable = False
    with pytest.raises(ValueError, match="is 0 units; it must lie between 1 and"):
        check_widths(groups, {**widths, groups[0].name: 0})
    scores = score_channels(unet, groups, criterion="random")
    scores[groups[0].name] = scores[groups[0].name] * 1e-3
    kept = allocate(unet, groups, scores, sizes=(0.5,), min_keep=0)[0].widths[groups[0].name]
    assert kept >= groups[0].width / 4

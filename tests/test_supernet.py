"""The design's invariants, over four real denoisers, before and after training, in float32 and bfloat16."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from conftest import (
    SIZES,
    make_supernet,
    make_unet,
    output,
    plain_unet,
    random_inputs,
    relative_error,
    squared_output_loss,
)
from diffusers import UNet2DModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.basis.change import change_module, change_of_basis
from ofadiff.channels import slices_by_module
from ofadiff.cutting import kept_by_module
from ofadiff.layers import cut_once
from ofadiff.profiling.cost import count_macs, count_parameters


def train_a_little(supernet, steps=3):
    """A few optimizer steps, each at another size."""
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-3)
    supernet.model.train()
    for step in range(steps):
        supernet.set_size(supernet.sizes[step % len(supernet.sizes)])
        optimizer.zero_grad()
        squared_output_loss(supernet.model, random_inputs(supernet.model, seed=step)).mean().backward()
        optimizer.step()
    supernet.model.eval()
    supernet.set_size("largest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [True, False])
def test_full_size_equals_the_original(unet, rotate, dtype):
    unet.to(dtype)
    inputs = random_inputs(unet)
    before = output(unet, inputs)
    keys = list(unet.state_dict())
    supernet = make_supernet(unet, rotate=rotate)
    assert supernet.model is unet and supernet.size == 1.0
    # Each side rounds its own weights and activations: a few times the unit roundoff.
    assert relative_error(output(unet, inputs), before) < (1e-5 if dtype is torch.float32 else 3e-2)
    assert list(unet.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_an_extracted_model_equals_the_supernet_at_that_size(unet, dtype, trained):
    supernet = make_supernet(unet)
    if trained:
        train_a_little(supernet)
    unet.to(dtype)
    inputs = random_inputs(unet)
    for size in SIZES:
        small = supernet.extract(size)
        supernet.set_size(size)
        assert small.dtype == dtype
        assert relative_error(output(small, inputs), output(unet, inputs)) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_reported_costs_equal_a_recount(unet):
    supernet = make_supernet(unet)
    for subnet in supernet.subnets:
        small = supernet.extract(subnet.size)
        assert count_parameters(small) == subnet.params
        assert count_macs(small) == subnet.macs
        with supernet.at(subnet.size):
            assert count_macs(unet) == subnet.macs


def test_units_are_sorted_by_importance():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="magnitude")
    Supernet(unet, groups, scores, allocate(unet, groups, scores))
    for group in groups:
        again = score_channels(unet, [group], criterion="magnitude")[group.name]
        assert torch.all(again[:-1] >= again[1:] - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_size_does_not_use_gets_no_gradient(unet, checkpointing, dtype):
    supernet = make_supernet(unet)
    unet.to(dtype)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    supernet.set_size("smallest")
    squared_output_loss(unet, random_inputs(unet)).mean().backward()
    widths = supernet.subnets[0].widths
    groups = {group.name: group for group in supernet.groups}
    for module, parts in slices_by_module(supernet.groups).items():
        for group, part in parts:
            kept = widths[groups[group].name]
            for name, parameter in unet.get_submodule(module).named_parameters(recurse=False):
                if part.axis == "in" and name == "bias":
                    continue
                gradient = parameter.grad.movedim(0 if part.axis == "out" else 1, 0)
                per_unit = part.per_unit(gradient.abs().reshape(len(gradient), -1).sum(1))
                assert torch.all(per_unit[kept:] == 0)
                # Softmax does not see what a key's bias adds to every score of a query.
                assert (name == "bias" and module.endswith("to_k")) or torch.all(per_unit[:kept] > 0), module


def test_a_subnet_is_the_full_model_with_the_other_units_masked():
    # Whole GroupNorm groups and the trained softmax scale: cutting is exactly dropping the units' contribution.
    unet = make_unet("sd15")
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    masked = make_unet("sd15")
    masked.load_state_dict(unet.state_dict())
    widths = supernet.subnets[0].widths
    with torch.no_grad():
        for module, kept in kept_by_module(supernet.groups, widths).items():
            for part, units in kept:
                for name, parameter in masked.get_submodule(module).named_parameters(recurse=False):
                    if part.axis == "in" and name == "bias":
                        continue
                    axis = parameter.movedim(0 if part.axis == "out" else 1, 0)
                    axis.unflatten(0, (part.repeats, part.units, part.channels))[:, units:] = 0
    supernet.set_size("smallest")
    assert relative_error(output(unet, inputs), output(masked, inputs)) < 1e-5


@pytest.mark.parametrize("rotate", [True, False])
def test_the_kept_basis_leads_from_the_original_weights_to_the_supernet_s(unet, rotate, tmp_path):
    original = copy.deepcopy(unet)
    make_supernet(unet, rotate=rotate).save_pretrained(tmp_path)
    loaded = Supernet.from_pretrained(tmp_path)
    for module, parts in slices_by_module(loaded.groups).items():
        for group, part in parts:
            change_module(original.get_submodule(module), part, change_of_basis(group, part, loaded.basis))
    for name, parameter in original.named_parameters():
        assert torch.allclose(parameter, loaded.model.get_parameter(name), atol=1e-6), name


def test_a_supernet_of_some_groups_saves_loads_and_extracts(unet, tmp_path):
    groups = [group for group in find_channel_groups(unet) if group.kind == "convolution"]
    scores = score_channels(unet, groups, criterion="magnitude")
    supernet = Supernet(unet, groups, scores, allocate(unet, groups, scores, sizes=(0.9, 1.0)))
    supernet.save_pretrained(tmp_path / "supernet")
    loaded = Supernet.from_pretrained(tmp_path / "supernet")
    inputs = random_inputs(unet)
    loaded.set_size(0.9)
    small = supernet.extract(0.9)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(output(loaded.model, inputs), output(small, inputs))
    assert torch.equal(output(type(small).from_pretrained(tmp_path / "small"), inputs), output(small, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_gives_the_same_bits(unet, dtype, tmp_path):
    supernet = make_supernet(unet)
    train_a_little(supernet)
    unet.to(dtype)
    supernet.save_pretrained(tmp_path, max_shard_size="1MB")
    loaded = Supernet.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.subnets == supernet.subnets and loaded.sizes == SIZES
    assert all(torch.equal(loaded.basis[name], tensor) for name, tensor in supernet.basis.items())
    inputs = random_inputs(unet)
    for size in SIZES:
        supernet.set_size(size)
        loaded.set_size(size)
        assert torch.equal(output(loaded.model, inputs), output(unet, inputs))
    # Plain diffusers loads it at full size.
    plain = type(unet).from_pretrained(tmp_path, torch_dtype=dtype)
    assert type(plain) is type(unet) and torch.equal(output(plain, inputs), output(unet, inputs))


def test_an_extracted_model_saves_and_loads_the_same_bits(unet, tmp_path):
    small = make_supernet(unet).extract(SIZES[0])
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == f"OFA{type(unet).__name__}"
    loaded = type(small).from_pretrained(tmp_path)
    inputs = random_inputs(unet)
    assert isinstance(loaded, type(unet))
    assert torch.equal(output(loaded, inputs), output(small, inputs))


def test_switching_leaves_no_trace(unet):
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    before = output(unet, inputs)
    with supernet.at("smallest"):
        small = output(unet, inputs)
    assert torch.equal(output(unet, inputs), before)
    assert not torch.allclose(small, before)
    with pytest.raises(RuntimeError, match="stop"), supernet.at(SIZES[1]):
        raise RuntimeError("stop")
    assert supernet.size == 1.0


def test_parts_that_were_cut_once_are_those_of_the_size_and_take_no_part_in_training(unet):
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    expected = {size: output(supernet.extract(size), inputs) for size in SIZES}
    with cut_once():
        for size in (*SIZES, *reversed(SIZES), SIZES[0]):
            supernet.set_size(size)
            assert relative_error(output(unet, inputs), expected[size]) < 1e-5
        squared_output_loss(unet, inputs).mean().backward()
    conv = unet.mid_block.resnets[0].conv1
    assert conv.kept and conv.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiling_makes_one_graph_per_size_and_none_when_a_size_returns():
    unet = plain_unet(block_out_channels=(32,), down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",))
    supernet = make_supernet(unet.eval())
    inputs = random_inputs(unet)
    graphs = CompileCounter()
    compiled = torch.compile(unet, backend=graphs)
    for size, expected in (("largest", 1), ("smallest", 2), ("largest", 2), ("smallest", 2)):
        supernet.set_size(size)
        assert relative_error(output(compiled, inputs), output(unet, inputs)) < 1e-5
        assert graphs.frame_count == expected


@pytest.mark.slow
def test_a_function_answers_calls_of_a_model_that_is_compiled_in_place_too():
    unet = plain_unet(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).eval()
    supernet = make_supernet(unet)
    inputs, sizes = random_inputs(unet), []
    expected = output(unet, inputs)

    def answer(call, args, kwargs):
        sizes.append(supernet.size)
        return call(*args, **kwargs)

    unet.compile(backend="eager")
    with supernet.answering(answer):
        assert relative_error(output(unet, inputs), expected) < 1e-5
        with pytest.raises(ValueError, match="leave that block first"), supernet.answering(answer):
            pass
    assert sizes == [1.0] and relative_error(output(unet, inputs), expected) < 1e-5 and sizes == [1.0]


def test_channels_last_stays_at_every_size_and_in_extracted_models():
    unet = make_unet("sd15")
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    formats = []

    def note(layer, args, made):
        formats.append(made.is_contiguous(memory_format=torch.channels_last))

    expected = {size: output(supernet.extract(size), inputs) for size in SIZES}
    unet.to(memory_format=torch.channels_last)
    for size in SIZES:
        supernet.set_size(size)
        small = supernet.extract(size)
        for model in (unet, small):
            convolutions = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
            hooks = [layer.register_forward_hook(note) for layer in convolutions]
            assert relative_error(output(model, inputs), expected[size]) < 1e-5
            assert len(formats) >= len(convolutions) and all(formats)
            for hook in hooks:
                hook.remove()
            formats.clear()
        assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convolutions)


def test_a_copy_has_its_own_size(unet):
    supernet = make_supernet(unet)
    twin = copy.deepcopy(supernet)
    twin.set_size("smallest")
    inputs = random_inputs(unet)
    assert supernet.size == 1.0
    assert not torch.allclose(output(twin.model, inputs), output(supernet.model, inputs))


def test_processors_agree_on_the_softmax_scale():
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    unet = make_unet("sd15")
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    supernet.set_size("smallest")
    unet.set_attn_processor(AttnProcessor2_0())
    fused = output(unet, inputs)
    unet.set_attn_processor(AttnProcessor())
    assert relative_error(output(unet, inputs), fused) < 1e-5


def test_what_would_go_wrong_silently_is_refused(tmp_path):
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    table = allocate(unet, groups, scores, sizes=(0.5, 1.0))
    hooked = cpu_offload(copy.deepcopy(unet), execution_device="cpu")
    with pytest.raises(ValueError, match="hook in place of its forward"):
        Supernet(hooked, groups, scores, table)
    with pytest.raises(ValueError, match=r"provenance cannot be kept as JSON: .*not JSON serializable"):
        Supernet(unet, groups, scores, table, provenance={"teacher": tmp_path})
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="part of an adapter"):
        Supernet(adapted, groups, scores, table)
    supernet = Supernet(unet, groups, scores, table)
    supernet.save_pretrained(tmp_path / "supernet")
    small = supernet.extract(0.5)
    with pytest.raises(ValueError, match="holds a supernet; save the extracted model in another folder"):
        small.save_pretrained(tmp_path / "supernet")
    with pytest.raises(ValueError, match="compress the original model instead"):
        Supernet(small, groups, scores, table)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters"):
        supernet.save_pretrained(tmp_path / "supernet")
    assert Supernet.from_pretrained(tmp_path / "supernet").sizes == (0.5, 1.0)


def test_bad_input(tmp_path):
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="random")
    table = allocate(unet, groups, scores)
    with pytest.raises(ValueError, match="scores lack"):
        Supernet(unet, groups, {}, table)
    with pytest.raises(ValueError, match="widths must name every channel group once"):
        Supernet(unet, groups[1:], scores, table)
    supernet = Supernet(unet, groups, scores, table)
    with pytest.raises(
        ValueError, match=r"size is 0\.3; it must be one of 0\.4, 0\.6, 0\.8, 1, 'smallest' or 'largest'"
    ):
        supernet.set_size(0.3)
    with pytest.raises(ValueError, match="elastic already"):
        Supernet(unet, groups, scores, table)
    with pytest.raises(ValueError, match=r"holds no ofa_config\.json"):
        Supernet.from_pretrained(tmp_path)
    supernet.save_pretrained(tmp_path)
    UNet2DModel.from_config({**unet.config, "block_out_channels": (32, 128)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was made for other channel groups"):
        Supernet.from_pretrained(tmp_path)

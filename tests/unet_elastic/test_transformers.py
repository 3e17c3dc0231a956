"""The design's invariants on tiny denoisers of many kinds, and every finder tried on the real class."""

import copy
import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import relative_error
from diffusers import ModelMixin
from tiny_transformers import TINY, tiny, tiny_inputs
from torch.utils._pytree import tree_leaves
from versions import since

from ofadiff import Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.allocation.width_ladders import ladder
from ofadiff.channels import row_axis, slices_by_module
from ofadiff.importance.matrices import scored_slices
from ofadiff.profiling.cost import count_macs, count_parameters, unit_parameters
from ofadiff.unet_elastic import FINDERS, verify_groups

# diffusers warns of its own classes, PyTorch of some of theirs.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

# What the invariants are tested on: every kind of block that the published families are made of.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "aura_flow": ("AuraFlowTransformer2DModel", {}),
    "cogvideox": ("CogVideoXTransformer3DModel", {}),
    "dit": ("DiTTransformer2DModel", {}),
    "flux": ("FluxTransformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "hunyuan_dit": ("HunyuanDiT2DModel", {}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
    "pixart": ("PixArtTransformer2DModel", {}),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "sana": ("SanaTransformer2DModel", {}),
    "sd3": ("SD3Transformer2DModel", {}),
    "sd35": ("SD3Transformer2DModel", {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "uvit": ("UVit2DModel", {}),
    "wan": ("WanTransformer3DModel", {}),
}
# Models with a layer that runs in float32 only.
FLOAT32_ONLY = {
    "BriaFiboTransformer2DModel",
    "CosmosTransformer3DModel",
    "Flux3Transformer2DModel",
    "Kandinsky5Transformer3DModel",
    "Krea2Transformer2DModel",
    "MochiTransformer3DModel",
    "MotifVideoTransformer3DModel",
}
# Models with blocks that cannot be cut: routed experts, a text attention between heads and their reader.
PARTLY_RIGID = {
    "HiDreamImageTransformer2DModel": "routed expert",
    "MotifVideoTransformer3DModel": "a text attention reads",
}


@dataclass
class Case:
    """A tiny denoiser, its inputs, what it made of them, and the supernet that it became."""

    name: str
    inputs: dict[str, Any]
    before: torch.Tensor
    supernet: Supernet


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, changes = CASES[request.param]
    model, inputs = tiny(name, **changes), tiny_inputs(name)
    before = output(model, inputs)
    groups = find_channel_groups(model)
    rotate_attention(model, groups)
    scores = score_channels(model, groups, [tiny_inputs(name, seed=1)], loss)
    owned, full = unit_parameters(model, groups), count_parameters(model)
    smallest = 1 - sum(owned[group.name] * (group.width - ladder(group, 0.25, 8)[0]) for group in groups) / full
    sizes = (math.ceil(smallest * 100) / 100, round((1 + smallest) / 2, 2), 1.0)
    subnets = allocate(model, groups, scores, sizes=sizes, inputs=tiny_inputs(name, batch_size=1))
    return Case(name, inputs, before, Supernet(model, groups, scores, subnets))


def output(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return prediction(model, inputs)


def prediction(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    return tree_leaves(model(**inputs))[0]


def loss(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    return prediction(model, inputs).float().square().flatten(1).mean(1)


def test_full_size_equals_the_original(case):
    assert relative_error(output(case.supernet.model, case.inputs), case.before) < 1e-5


def test_an_extracted_model_equals_the_supernet_before_and_after_training(case):
    trained = copy.deepcopy(case.supernet)
    trained.set_size("smallest")
    optimizer = torch.optim.SGD(trained.model.parameters(), lr=1e-2)
    loss(trained.model, case.inputs).mean().backward()
    optimizer.step()
    for supernet in (case.supernet, trained):
        for size in supernet.sizes:
            with supernet.at(size) as model:
                assert relative_error(output(supernet.extract(size), case.inputs), output(model, case.inputs)) < 1e-5


def test_costs_are_exact_and_rise(case):
    one = tiny_inputs(case.name, batch_size=1)
    subnets = list(case.supernet.subnets)
    for subnet in subnets:
        small = case.supernet.extract(subnet.size)
        assert (count_parameters(small), count_macs(small, one)) == (subnet.params, subnet.macs)
    for smaller, larger in itertools.pairwise(subnets):
        assert smaller.params < larger.params and smaller.macs < larger.macs
        assert all(width <= larger.widths[name] for name, width in smaller.widths.items())


def test_a_size_changes_the_output_and_leaves_no_trace(case):
    full = output(case.supernet.model, case.inputs)
    with case.supernet.at("smallest") as model:
        assert relative_error(output(model, case.inputs), full) > 1e-4
    assert torch.equal(output(case.supernet.model, case.inputs), full)


def test_what_a_size_does_not_use_gets_no_gradient(case):
    supernet = copy.deepcopy(case.supernet)
    supernet.set_size("smallest")
    loss(supernet.model, case.inputs).mean().backward()
    widths, touched = supernet.subnets[0].widths, 0
    for module, parts in slices_by_module(supernet.groups).items():
        for name, parameter in supernet.model.get_submodule(module).named_parameters(recurse=False):
            if parameter.grad is None:  # the last block's text stream
                continue
            for group, part in parts:
                if part.axis == "out" or name == "weight":
                    axis = row_axis(parameter.shape) if part.axis == "out" else 1
                    rows = parameter.grad.movedim(axis, 0)
                    per_unit = part.per_unit(rows.abs().reshape(len(rows), -1).sum(1))
                    assert torch.all(per_unit[widths[group] :] == 0), module
                    touched += int(per_unit[: widths[group]].count_nonzero())
    assert touched > 0


def test_saving_and_loading_gives_the_same_bits(case, tmp_path):
    case.supernet.save_pretrained(tmp_path / "supernet")
    loaded = Supernet.from_pretrained(tmp_path / "supernet")
    small = case.supernet.extract("smallest")
    small.save_pretrained(tmp_path / "small")
    with case.supernet.at("smallest") as model, loaded.at("smallest"):
        assert torch.equal(output(loaded.model, case.inputs), output(model, case.inputs))
    assert torch.equal(output(type(small).from_pretrained(tmp_path / "small"), case.inputs), output(small, case.inputs))


@pytest.mark.parametrize("name", CASES)
def test_batched_scores_equal_per_sample_autograd(name):
    class_name, changes = CASES[name]
    model, batch = tiny(class_name, **changes), tiny_inputs(class_name)
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, [batch], loss)
    expected = {group.name: torch.zeros(group.width) for group in groups}
    for n in range(2):
        model.zero_grad()
        loss(model, batch)[n].backward()
        for group in groups:
            for part in scored_slices(model, group):
                weight = model.get_submodule(part.module).weight
                if weight.grad is None:  # the last block's text stream
                    continue
                products = weight.detach() * weight.grad
                rows = products if part.axis == "out" else products.transpose(0, 1)
                expected[group.name] += part.per_unit(rows.flatten(1).sum(1).abs()) / 2
    for group in groups:
        error = (scores[group.name] - expected[group.name]).abs().max()
        assert error <= 1e-4 * expected[group.name].abs().max(), group.name


@pytest.mark.parametrize("name", TINY)
def test_every_group_is_exact_to_reorder_and_to_cut(name):
    model, inputs = tiny(name), tiny_inputs(name)
    if name in PARTLY_RIGID:
        with pytest.warns(UserWarning, match=PARTLY_RIGID[name]):
            groups = find_channel_groups(model)
    else:
        groups = find_channel_groups(model)
    if name in FLOAT32_ONLY:
        verify_groups(model, groups, inputs, tolerance=1e-4, dtype=torch.float32)
    else:
        verify_groups(model, groups, inputs)


@pytest.mark.parametrize("path", FINDERS)
def test_every_block_in_the_table_exists(path):
    assert since(path), "a class that diffusers renames or moves would silently stay rigid"


def test_a_processor_with_weights_of_its_own_is_named():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny("FluxTransformer2DModel")
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))
    with pytest.warns(UserWarning, match=r"transformer_blocks\.0\.attn stays rigid: its processor FluxIPAdapterAttn"):
        groups = find_channel_groups(model)
    assert "transformer_blocks.0.attn" not in {group.name for group in groups}


def test_what_no_rule_covers_is_named():
    amplified = tiny("HeliosTransformer3DModel", is_amplify_history=True)
    with pytest.warns(UserWarning, match=r"attn1 \(and 1 more\) stays rigid: no rule covers its parameter history_key"):
        find_channel_groups(amplified)
    fused = tiny("FluxTransformer2DModel")
    fused.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="its projections are fused; call unfuse_qkv_projections"):
        find_channel_groups(fused)


def test_rotary_embeddings_that_differ_by_head_leave_queries_and_keys_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = {group.name: group for group in find_channel_groups(tiny("LTXVideoTransformer3DModel"))}
    cut = {part.module.rpartition(".")[2] for part in groups["transformer_blocks.0.attn1"].slices}
    assert "to_v" in cut and not cut & {"to_q", "to_k"}

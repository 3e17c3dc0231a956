"""Orthogonal steps for the matrices of blocks, AdamW's for all else."""

import copy

import pytest
import torch
from conftest import make_unet, random_inputs, squared_output_loss
from tiny_transformers import tiny
from torch import nn

from ofadiff import find_channel_groups
from ofadiff.training.muon import STEP_SIZE, Muon, orthogonalized, split_weights


@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (72, 8)])
def test_a_step_goes_equally_far_along_all_directions(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u * torch.logspace(0, -1.2, len(s)) @ v
    found = orthogonalized(matrix)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3 and values.min() > 0.5
    assert nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert not orthogonalized(torch.zeros(shape)).any()


@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Conv2d(8, 16, 3), nn.Conv1d(12, 6, 1)])
def test_matrices_move_as_far_as_adamw_moves_them_and_the_rest_moves_as_adamw_moves_it(layer):
    torch.manual_seed(0)
    other = copy.deepcopy(layer)
    ours = Muon([layer.weight], [layer.bias], lr=1e-3, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1)
    start = layer.weight.detach().clone()
    for step in range(3):
        for parameter, twin in zip(layer.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(layer.bias, other.bias)
        if step == 0:
            moved = (layer.weight.detach() - start * (1 - 1e-4)).square().mean().sqrt()
            assert float(moved) == pytest.approx(1e-3 * STEP_SIZE, rel=0.3)


@pytest.mark.parametrize("name", ["sd15", "DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_every_weight_is_trained_once_and_embeddings_and_the_last_layer_are_no_matrices(name):
    model = make_unet(name) if name == "sd15" else tiny(name)
    model.get_submodule(find_channel_groups(model)[0].slices[0].module).requires_grad_(False)
    matrices, others = split_weights(model, find_channel_groups(model))
    wanted = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert {**matrices, **others}.keys() == wanted.keys() and not matrices.keys() & others.keys()
    assert all(value.ndim >= 2 for value in matrices.values())
    assert sum(value.numel() for value in matrices.values()) > 0.5 * sum(value.numel() for value in wanted.values())
    for key in ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "x_embedder.weight"):
        assert key not in matrices
    for key in ("proj_out.weight", "proj_out_2.weight", "pos_embed.proj.weight"):
        assert key not in matrices


def test_a_saved_state_goes_on_as_it_was():
    model = make_unet("plain")
    matrices, others = split_weights(model, find_channel_groups(model))
    optimizer = Muon(matrices.values(), others.values(), lr=1e-3)

    def step(model, optimizer, seed):
        squared_output_loss(model, random_inputs(model, seed=seed)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer, 0)
    again = copy.deepcopy(model)
    matrices, others = split_weights(again, find_channel_groups(again))
    resumed = Muon(matrices.values(), others.values(), lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(again, resumed, 1)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_bad_input():
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"a weight of shape \(3,\) is no matrix"):
        Muon([weight], [])
    with pytest.raises(ValueError, match="momentum is 1; it must be at least 0 and below 1"):
        Muon([], [weight], momentum=1)

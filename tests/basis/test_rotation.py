import pytest
import torch
from conftest import make_unet, output, plain_unet, random_inputs, relative_error

from ofadiff import Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.cutting import make_model_elastic, set_widths


def test_full_size_is_unchanged(unet):
    for parameter in unet.parameters():  # biases and zero-initialised weights must count too
        torch.nn.init.normal_(parameter, std=0.05)
    unet.double()
    inputs = random_inputs(unet)
    before = output(unet, inputs)
    groups = find_channel_groups(unet)
    rotate_attention(unet, groups)
    assert relative_error(output(unet, inputs), before) < 1e-12
    assert all((group.basis is not None) == group.kind.endswith("attention") for group in groups)


def test_a_prefix_of_queries_and_keys_is_the_best_low_rank_cut():
    unet = make_unet("sd15").double()
    group = next(group for group in find_channel_groups(unet) if group.kind == "self_attention")
    attn = unet.get_submodule(group.name)

    def products():
        queries, keys = (layer.weight.detach().unflatten(0, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k))
        values = attn.to_v.weight.detach().unflatten(0, (attn.heads, -1))
        outputs = attn.to_out[0].weight.detach().unflatten(1, (attn.heads, -1)).permute(1, 0, 2)
        return (queries.mT, keys), (outputs, values)

    full = [left @ right for left, right in products()]
    rotate_attention(unet, [group])
    kept = group.width // 2
    for product, (left, right) in zip(full, products(), strict=True):
        singular = torch.linalg.svdvals(product)
        error = torch.linalg.matrix_norm(product - left[..., :kept] @ right[:, :kept])
        # Eckart-Young: no product of rank `kept` is closer.
        best = singular[:, kept:].square().sum(-1).sqrt()
        assert torch.allclose(error, best)


def test_rotation_makes_the_cut_smaller(unet):
    inputs = random_inputs(unet)
    expected = output(unet, inputs)

    def error_at_half(model):
        groups = find_channel_groups(model)
        widths = {g.name: g.width // 2 if g.rotatable else g.width for g in groups}
        make_model_elastic(model, groups)
        set_widths(model, groups, widths)
        return relative_error(output(model, inputs), expected)

    state = unet.state_dict()
    rotated = type(unet).from_config(unet.config).eval()
    rotated.load_state_dict(state)
    rotate_attention(rotated, find_channel_groups(rotated))
    assert error_at_half(rotated) < error_at_half(unet)


def test_the_basis_leads_from_the_original_weights_to_the_rotated_ones():
    unet = make_unet("plain").double()
    group = next(group for group in find_channel_groups(unet) if group.rotatable)
    attn = unet.get_submodule(group.name)
    original = {name: layer.weight.detach().clone() for name, layer in (("q", attn.to_q), ("k", attn.to_k))}
    rotate_attention(unet, [group])
    M = group.basis["query_key"]
    queries = M @ original["q"].unflatten(0, (attn.heads, -1))
    keys = torch.linalg.inv(M).mT @ original["k"].unflatten(0, (attn.heads, -1))
    assert torch.allclose(queries.flatten(0, 1), attn.to_q.weight)
    assert torch.allclose(keys.flatten(0, 1), attn.to_k.weight)
    assert torch.linalg.cond(M).max() < 100  # adapters pass through M


def test_a_head_without_full_rank_is_only_sorted():
    model = plain_unet().double().eval()
    group = next(group for group in find_channel_groups(model) if group.rotatable)
    attn = model.get_submodule(group.name)
    with torch.no_grad():
        attn.to_k.weight[:3] = 0
        attn.to_k.bias[:3] = 0
    inputs = random_inputs(model)
    before = output(model, inputs)
    rotate_attention(model, [group])
    permutation, turned = group.basis["query_key"][:2]
    assert torch.equal(permutation @ permutation.T, torch.eye(group.width, dtype=torch.float64))
    assert set(permutation.unique().tolist()) == {0.0, 1.0}
    assert not torch.allclose(turned @ turned.T, torch.eye(group.width, dtype=torch.float64))
    assert relative_error(output(model, inputs), before) < 1e-12
    # What attends to nothing comes last.
    assert torch.all(attn.to_k.weight[: group.width][-3:] == 0) and torch.all(attn.to_k.weight[0] != 0)


def test_rotating_twice_is_refused():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    rotate_attention(unet, groups)
    with pytest.raises(ValueError, match="rotated already"):
        rotate_attention(unet, groups)
    fresh = find_channel_groups(unet)
    with pytest.raises(ValueError, match="was rotated with other groups"):
        rotate_attention(unet, fresh)
    scores = score_channels(unet, fresh, criterion="random")
    with pytest.raises(ValueError, match="was rotated with other groups"):
        Supernet(unet, fresh, scores, allocate(unet, fresh, scores))

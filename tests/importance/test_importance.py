import pytest
import torch
from conftest import make_unet, random_inputs, relative_error, squared_output_loss
from scipy.stats import spearmanr

from ofadiff import find_channel_groups, score_channels
from ofadiff.importance.matrices import scored_slices


def by_autograd(model, groups, batch):
    """Equation 4 literally: one sample at a time, weight gradients, w · ∂L/∂w summed per row or column."""
    samples = len(batch["sample"])
    total = {group.name: torch.zeros(group.width, dtype=torch.float64) for group in groups}
    for n in range(samples):
        model.zero_grad()
        squared_output_loss(model, pick(batch, n)).sum().backward()
        for group in groups:
            for part in scored_slices(model, group):
                weight = model.get_submodule(part.module).weight
                products = (weight.detach() * weight.grad).double()
                rows = products if part.axis == "out" else products.transpose(0, 1)
                total[group.name] += part.per_unit(rows.flatten(1).sum(1).abs())
    return {name: value / samples for name, value in total.items()}


def pick(value, n):
    if isinstance(value, dict):
        return {key: pick(entry, n) for key, entry in value.items()}
    return value[n : n + 1]


def test_batched_scores_equal_per_sample_autograd(unet):
    groups = find_channel_groups(unet)
    batch = random_inputs(unet, batch_size=3)
    scores = score_channels(unet, groups, [batch], squared_output_loss)
    for name, expected in by_autograd(unet, groups, batch).items():
        assert scores[name].shape == expected.shape
        assert relative_error(scores[name].double(), expected) < 1e-4, name


def test_scores_do_not_depend_on_how_samples_are_batched():
    unet = make_unet("sd15")
    groups = find_channel_groups(unet)
    batch = random_inputs(unet, batch_size=4)
    together = score_channels(unet, groups, [batch], squared_output_loss)
    alone = score_channels(unet, groups, [pick(batch, n) for n in range(4)], squared_output_loss)
    assert all(relative_error(alone[name], together[name]) < 1e-4 for name in together)


def test_scoring_leaves_the_model_as_it_was(unet):
    unet.train()
    unet.mid_block.eval()
    frozen = next(unet.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    score_channels(unet, find_channel_groups(unet), [random_inputs(unet)], squared_output_loss)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert unet.training and not unet.mid_block.training and not frozen.requires_grad
    assert all(p.grad is None for p in unet.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(("dtype", "least_correlation"), [(torch.bfloat16, 0.9), (torch.float16, 0.95)])
def test_half_precision_gives_the_same_order_at_small_losses(dtype, least_correlation):
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    batch = random_inputs(unet, batch_size=4)

    def small_loss(model, inputs):
        return squared_output_loss(model, inputs) * 1e-2

    exact = score_channels(unet, groups, [batch], small_loss)
    unet.to(dtype)
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    rounded = score_channels(unet, groups, [half], small_loss)
    for name in exact:
        assert spearmanr(exact[name], rounded[name]).statistic > least_correlation, name


def test_loss_threshold_leaves_out_easy_samples():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    batch = random_inputs(unet, batch_size=4)
    weight = torch.tensor([1.0, 1.0, 1e-3, 1e-3])

    def loss_fn(model, inputs):
        return squared_output_loss(model, inputs) * weight[: len(inputs["sample"])]

    hard = score_channels(unet, groups, [{key: value[:2] for key, value in batch.items()}], loss_fn)
    scores = score_channels(unet, groups, [batch], loss_fn, loss_threshold=0.1)
    assert all(relative_error(scores[name], hard[name]) < 1e-4 for name in hard)


def test_magnitude_is_the_norm_of_rows_and_columns():
    unet = make_unet("sd15")
    group = next(group for group in find_channel_groups(unet) if group.kind == "feed_forward")
    block = unet.get_submodule(group.name)
    rows = block.net[0].proj.weight.detach().norm(dim=1)
    expected = rows[: group.width] + rows[group.width :] + block.net[2].weight.detach().norm(dim=0)
    assert torch.allclose(score_channels(unet, [group], criterion="magnitude")[group.name], expected)


def test_random_is_seeded():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    first, again, other = (score_channels(unet, groups, criterion="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_bad_input():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    batches = [random_inputs(unet)]
    with pytest.raises(
        ValueError, match="criterion is 'hessian'; it must be one of magnitude, random, sensitivity, taylor"
    ):
        score_channels(unet, groups, batches, squared_output_loss, criterion="hessian")
    with pytest.raises(ValueError, match="needs batches and loss_fn"):
        score_channels(unet, groups)
    with pytest.raises(ValueError, match="no batch"):
        score_channels(unet, groups, [], squared_output_loss)
    with pytest.raises(ValueError, match=r"loss of shape \(\); it must be \(N,\)"):
        score_channels(unet, groups, batches, lambda *a: squared_output_loss(*a).mean())
    with pytest.raises(ValueError, match="not finite"):
        score_channels(unet, groups, batches, lambda *a: squared_output_loss(*a) * float("nan"))

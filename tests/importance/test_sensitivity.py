"""Ranking by what units do to the output, without a loss."""

import pytest
import torch
from conftest import make_unet, random_inputs
from scipy.stats import spearmanr

from ofadiff import find_channel_groups, score_channels


def output(model, batch):
    return model(**batch).sample.flatten(1)


@torch.no_grad()
def effects(model, group, batch):
    """How far the output moves without each unit, to first order: its writers and readers a hundredth smaller."""
    whole = output(model, batch)
    found = []
    for unit in range(group.width):
        moved = 0.0
        for part in group.slices:
            weight = model.get_submodule(part.module).weight
            if weight.ndim < 2:
                continue
            rows = part.start + part.indices(torch.tensor([unit])).reshape(-1)
            before = weight.clone()
            (weight if part.axis == "out" else weight.transpose(0, 1))[rows] *= 0.99
            moved += (output(model, batch) - whole).norm(dim=1).mean().item()
            weight.copy_(before)
        found.append(moved)
    return found


def test_units_are_ranked_by_what_they_do_to_the_output():
    unet = make_unet("plain").eval()
    groups = find_channel_groups(unet)
    batch = random_inputs(unet, batch_size=8)
    scores = score_channels(unet, groups, [batch] * 12, output, criterion="sensitivity")
    convolutions = [group for group in groups if group.kind == groups[0].kind]
    ranked = torch.cat([scores[group.name] for group in convolutions])
    moved = [effect for group in convolutions for effect in effects(unet, group, batch)]
    assert len(convolutions) > 3 and spearmanr(ranked, moved).statistic > 0.7


def test_directions_are_seeded_and_a_loss_is_refused():
    unet = make_unet("plain")
    groups = find_channel_groups(unet)
    batches = [random_inputs(unet)] * 2
    first, again, other = (
        score_channels(unet, groups, batches, output, criterion="sensitivity", seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match=r"loss_fn gave a tensor of shape \(2,\); .* it must be the output, \(N, …\)"):
        score_channels(unet, groups, batches, lambda *a: output(*a).mean(dim=1), criterion="sensitivity")
    with pytest.raises(ValueError, match="needs batches, and in place of loss_fn what gives the output"):
        score_channels(unet, groups, criterion="sensitivity")

"""MIND against what it is by definition: optimal transport on lines."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ofadiff.evaluation.metrics.mind import SEED, monge_distance


def features(count, seed, dimensions=6):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_have_no_distance_in_whatever_order():
    real = features(50, 0)
    assert monge_distance(real, real) == 0
    assert monge_distance(real[torch.randperm(50)], real) == pytest.approx(0, abs=1e-20)


def test_a_shift_moves_every_sample_by_it():
    # Along u a shift v is u·v, whose square has the mean |v|² / D over all u: 3 |v|² in all.
    real, shift = features(50, 0), torch.tensor([0.0, 3, 0, 0, -4, 0])
    found = [monge_distance(real + factor * shift, real) for factor in (0.1, 1, 2)]
    assert found[1] == pytest.approx(3 * 25, rel=0.1)
    assert found == pytest.approx([found[1] / 100, found[1], 4 * found[1]], rel=1e-5)


def test_it_is_the_cheapest_transport_along_each_direction():
    ours, real = 2 * features(12, 1), features(12, 0)
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(7, 6, generator=generator).double().numpy()
    costs = []
    for direction in directions:
        x, y = (each.double().numpy() @ direction / np.linalg.norm(direction) for each in (ours, real))
        cost = (x[:, None] - y[None]) ** 2
        costs.append(cost[linear_sum_assignment(cost)].mean())
    assert monge_distance(ours, real, directions=7) == pytest.approx(3 * 6 * np.mean(costs))


def test_what_moments_do_not_see_is_seen():
    # Two sets of one mean and variance: a Gaussian, and two points.
    gaussian = torch.special.ndtri((torch.arange(400).double() + 0.5) / 400)[:, None]
    points = torch.tensor([[-1.0], [1.0]]).double().repeat(200, 1) * gaussian.std(correction=0)
    assert monge_distance(points, gaussian) > 0.5


def test_of_a_larger_set_as_many_are_drawn_the_same_each_time():
    ours, real = features(40, 1), features(300, 0)
    near = monge_distance(ours, real)
    assert near == monge_distance(ours, real)
    assert 0 < near < 0.2 * monge_distance(ours + 1, real)
    assert monge_distance(real, ours) == near


def test_nothing_has_no_distance():
    with pytest.raises(ValueError, match="there are 0 samples and 9 to compare with"):
        monge_distance(features(0, 0), features(9, 1))

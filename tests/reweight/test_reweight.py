from collections import Counter

import pytest

from ofadiff.reweight import STRATEGIES, sample_size

SIZES = (0.4, 0.6, 0.8, 1.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_size_depends_on_seed_and_step_only(strategy):
    drawn = [sample_size(SIZES, step, seed=3, strategy=strategy) for step in range(50)]
    backwards = [sample_size(SIZES[::-1], step, seed=3, strategy=strategy) for step in reversed(range(50))]
    assert drawn == backwards[::-1]
    assert drawn != [sample_size(SIZES, step, seed=4, strategy=strategy) for step in range(50)]


@pytest.mark.parametrize(
    ("strategy", "weights"),
    [
        ("spread", (3, 7 / 3, 5 / 3, 1)),
        ("linear", (3, 7 / 3, 5 / 3, 1)),
        ("uniform", (1, 1, 1, 1)),
        ("sandwich", (5 / 4, 1 / 4, 1 / 4, 5 / 4)),
    ],
)
def test_sizes_are_drawn_as_often_as_their_weights_say(strategy, weights):
    steps = 12_000
    drawn = Counter(sample_size(SIZES, step, seed=0, strategy=strategy) for step in range(steps))
    for size, weight in zip(SIZES, weights, strict=True):
        p = weight / sum(weights)
        assert abs(drawn[size] - steps * p) < 4 * (steps * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("first", "steps"), [(0, 50), (777, 50), (10_000_000, 200)])
@pytest.mark.parametrize("m", [3, 9, 0.5])
def test_spread_draws_have_their_shares_in_every_stretch_of_steps(first, steps, m):
    drawn = Counter(sample_size(SIZES, step, 5, "spread", m=m) for step in range(first, first + steps))
    weights = [m + (1 - m) * rank / 3 for rank in range(4)]
    for size, weight in zip(SIZES, weights, strict=True):
        assert abs(drawn[size] - steps * weight / sum(weights)) < 2


def test_the_sandwich_alternates_smallest_and_largest():
    drawn = [sample_size(SIZES, step, seed=0, strategy="sandwich") for step in range(9)]
    assert drawn[0::3] == [0.4] * 3 and drawn[1::3] == [1.0] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_size_is_always_drawn(strategy):
    assert {sample_size([0.5], step, seed=0, strategy=strategy) for step in range(6)} == {0.5}


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(ValueError, match=r"'linaer'; accepted: spread, linear, uniform, sandwich"):
        sample_size(SIZES, 0, 0, strategy="linaer")
    with pytest.raises(ValueError, match="no sizes"):
        sample_size([], 0, 0)
    with pytest.raises(ValueError, match="m is 0"):
        sample_size(SIZES, 0, 0, m=0)
    with pytest.raises(ValueError, match="m is inf"):
        sample_size(SIZES, 0, 0, "spread", m=float("inf"))

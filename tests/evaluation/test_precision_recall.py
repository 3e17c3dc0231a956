"""Precision and recall on sets that say what they must be, and against torch-fidelity's own command."""

import pytest
import torch
import torch_fidelity
from evaluation.random_images import random_images
from evaluation.test_distances import Images

from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.metric import Subject
from ofadiff.evaluation.metrics.precision_recall import PRECISION, RECALL, precision_and_recall


def features(count, seed, dimensions=6):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_a_set_lies_in_itself():
    real = features(60, 0)
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real[torch.randperm(60)], real) == (1, 1)


def test_sets_far_apart_share_nothing():
    assert precision_and_recall(features(60, 0) + 100, features(60, 1)) == (0, 0)


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    real = features(200, 0)
    collapsed = real[:1] + 1e-3 * features(100, 1)
    precision, recall = precision_and_recall(collapsed, real)
    assert precision == 1 and recall < 0.02


def test_a_generator_that_scatters_recalls_and_is_not_precise():
    precision, recall = precision_and_recall(5 * features(200, 1), features(200, 0))
    assert precision < 0.2 and recall > 0.8


def test_half_of_the_modes_are_half_of_the_recall():
    modes = torch.cat([features(100, 0), features(100, 1) + 50])
    precision, recall = precision_and_recall(modes[:100] + 1e-4, modes)
    assert (precision, recall) == (1, 0.5)


def test_balls_grow_with_k():
    ours, real = 1.5 * features(80, 1), features(80, 0)
    pairs = [precision_and_recall(ours, real, k) for k in (1, 3, 9)]
    assert pairs == sorted(pairs) and pairs[0] != pairs[2]


def test_they_are_counted_as_the_paper_says():
    ours, real, k = features(40, 1) + 0.7, features(50, 0), 2
    distances = [torch.linalg.vector_norm(a[:, None] - b[None], dim=-1) for a, b in ((ours, real), (real, ours))]
    radii = [torch.linalg.vector_norm(a[:, None] - a[None], dim=-1).sort(dim=1).values[:, k] for a in (real, ours)]
    expected = [
        (each <= radius).any(dim=1).double().mean().item() for each, radius in zip(distances, radii, strict=True)
    ]
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_and_recall(ours, real, k) == pytest.approx(expected)


def test_the_numbers_are_those_of_torch_fidelity():
    ours, real = random_images(60, seed=0), random_images(80, seed=1)
    extractor = FeatureExtractor("tiny")
    options = {"feature_extractor": "tiny", "prc": True, "prc_neighborhood": 2, "save_cpu_ram": True}
    expected = torch_fidelity.calculate_metrics(
        input1=Images(ours), input2=Images(real), cuda=False, cache=False, verbose=False, **options
    )
    found = precision_and_recall(extractor.features(ours), extractor.features(real), 2)
    assert min(found) > 0 and max(found) < 1
    assert found == pytest.approx((expected["precision"], expected["recall"]))


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="the smaller set has 5 samples; a neighborhood of 5 takes at least 6"):
        precision_and_recall(features(5, 0), features(9, 1), 5)
    with pytest.raises(ValueError, match="neighborhood is 0; it must be at least 1"):
        precision_and_recall(features(5, 0), features(9, 1), 0)


def test_both_metrics_measure_once_and_with_the_given_k(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "ofadiff.evaluation.metrics.precision_recall.precision_and_recall",
        lambda *args: calls.append(args) or (0.25, 0.75),
    )
    images = Images(random_images(6))
    subject = Subject(
        torch.nn.Identity(),
        images,
        {},
        gather=lambda values: values,
        reference_features=features(9, 0),
        extractor=FeatureExtractor("tiny"),
        prc_neighborhood=2,
    )
    assert PRECISION.measure(subject) == {"precision": 0.25} and RECALL.measure(subject) == {"recall": 0.75}
    assert len(calls) == 1 and calls[0][2] == 2

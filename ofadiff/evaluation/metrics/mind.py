"""Monge distance of two sets of features: MIND where they are Inception's.

Berthet et al., "MIND: Monge Inception Distance for Generative Models Evaluation" (2026), arXiv 2605.06797: the squared
sliced 2-Wasserstein distance, times 3 D. torch-fidelity 0.4.0, the latest that is released, does not have it; its
development version does, and this draws the same directions, for the same number up to rounding.
"""

from __future__ import annotations

import torch

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column

# M and the seed of the directions, as torch-fidelity has them.
DIRECTIONS = 1000
SEED = 2020
# Directions whose projections are in memory at once.
AT_ONCE = 100


def monge_distance(features: torch.Tensor, reference: torch.Tensor, directions: int = DIRECTIONS) -> float:
    """3 D times the mean over unit vectors u of W₂²(uᵀX, uᵀY): what moving one set onto the other takes along a line.

    0 for two equal sets, biased upwards for few samples; the paper takes 5000. Of the larger set as many are drawn as
    the smaller one has, always the same ones.

    Args:
        features: X, `(N, D)`.
        reference: Y, `(M, D)`.
        directions: How many unit vectors.

    Raises:
        ValueError: If a set has no samples.
    """
    count = min(len(features), len(reference))
    if count == 0:
        raise ValueError(f"there are {len(features)} samples and {len(reference)} to compare with; there must be some")
    generator = torch.Generator().manual_seed(SEED)
    x, y = (_draw(each.cpu(), count, generator).double() for each in (features, reference))
    dimensions = x.shape[1]
    vectors = torch.randn(directions, dimensions, generator=generator).double()
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    total = 0.0
    for some in vectors.split(AT_ONCE):
        # On a line the best plan moves the i-th smallest to the i-th smallest.
        moved = (x @ some.T).sort(dim=0).values - (y @ some.T).sort(dim=0).values
        total += moved.square().mean(dim=0).sum().item()
    return 3 * dimensions * total / directions


def _draw(features: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    if len(features) == count:
        return features
    return features[torch.randperm(len(features), generator=generator)[:count]]


def mind(subject: Subject) -> dict[str, float | None]:
    """Monge distance to the reference images."""
    assert subject.reference_features is not None
    features = subject.features
    return {"mind": monge_distance(features, subject.reference_features)} if subject.is_main else {}


MIND = Metric(mind, {"mind": Column("MIND", better="lower")}, needs=("images", "reference", "reference images"))

"""Kernel distance of two sets of features: KID where they are Inception's.

Bińkowski et al., "Demystifying MMD GANs", section 4: the unbiased squared MMD under the kernel (xᵀy / D + 1)³.
"""

from __future__ import annotations

import torch

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation over random subsets, as torch-fidelity computes them.

    100 subsets of 1000 samples each, or of half the smaller set where that is less: subsets that nearly coincide would
    say nothing about the spread.

    Args:
        features: `(N, D)`.
        reference: `(M, D)`.

    Raises:
        ValueError: If a set has fewer than four samples.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    fewest = min(len(features), len(reference))
    if fewest < 4:
        raise ValueError(f"the smaller set has {fewest} samples; subsets of half of them take at least 4")
    distances = kid_features_to_metric(
        features.double(),
        reference.double(),
        kid_subsets=SUBSETS,
        kid_subset_size=min(SUBSET_SIZE, fewest // 2),
        verbose=False,
    )
    return distances[KEY_METRIC_KID_MEAN], distances[KEY_METRIC_KID_STD]


def kid(subject: Subject) -> dict[str, float | None]:
    """Kernel distance to the reference images."""
    assert subject.reference_features is not None
    features = subject.features
    if not subject.is_main:
        return {}
    mean, deviation = kernel_distance(features, subject.reference_features)
    return {"kid": mean, "kid_std": deviation}


KID = Metric(
    kid,
    {"kid": Column("KID", digits=4, better="lower", spread="kid_std")},
    needs=("images", "reference", "reference images"),
    over_dinov2={"kid": "KD-DINOv2"},
)

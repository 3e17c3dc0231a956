"""Precision and recall of two sets of features: how many samples look real, and how much of what is real is sampled.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), arXiv 1904.06991,
equations 1 and 2. A sample counts if it lies in the ball around a sample of the other set that reaches to that one's
k-th neighbour in its own set.
"""

from __future__ import annotations

import torch

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column

NEIGHBORHOOD = 3
# Rows of distances that are in memory at once.
ROWS = 1000


def precision_and_recall(
    features: torch.Tensor, reference: torch.Tensor, neighborhood: int = NEIGHBORHOOD
) -> tuple[float, float]:
    """Share of the samples that look real, and share of the reference that the samples cover, both of 1.

    As torch-fidelity computes them from version 0.4 on, in float64. The paper takes 50000 of each and k = 3; only
    numbers of equally many samples and one k compare.

    Args:
        features: Of the samples, `(N, D)`.
        reference: Of real images, `(M, D)`.
        neighborhood: k, which of its neighbours a sample's ball reaches to.

    Raises:
        ValueError: If k is below 1, or a set has no more than k samples.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if neighborhood < 1:
        raise ValueError(f"neighborhood is {neighborhood}; it must be at least 1")
    fewest = min(len(features), len(reference))
    if fewest <= neighborhood:
        raise ValueError(
            f"the smaller set has {fewest} samples; a neighborhood of {neighborhood} takes at least {neighborhood + 1}"
        )
    found = prc_features_to_metric(
        features.double(),
        reference.double(),
        prc_neighborhood=neighborhood,
        prc_batch_size=ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _both(subject: Subject) -> tuple[float, float]:
    assert subject.reference_features is not None
    return precision_and_recall(subject.features, subject.reference_features, subject.prc_neighborhood)


def precision(subject: Subject) -> dict[str, float | None]:
    """Share of the samples that lie among the reference images."""
    _ = subject.features  # every process has a part in them
    return {"precision": subject.once(_both)[0]} if subject.is_main else {}


def recall(subject: Subject) -> dict[str, float | None]:
    """Share of the reference images that lie among the samples."""
    _ = subject.features
    return {"recall": subject.once(_both)[1]} if subject.is_main else {}


NEEDS = ("images", "reference", "reference images")
PRECISION = Metric(precision, {"precision": Column("precision", digits=3, better="higher")}, NEEDS)
RECALL = Metric(recall, {"recall": Column("recall", digits=3, better="higher")}, NEEDS)

"""Fréchet distance of two sets of features: FID where they are Inception's.

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6. Over
DINOv2's features it is FD-DINOv2: Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair
treatment of diffusion models" (2023), arXiv 2306.04675.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column


def frechet_distance(features: torch.Tensor, reference: torch.Tensor | FeatureStatistics) -> float:
    """||μ1 - μ2||² + Tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), as torch-fidelity computes it.

    Biased upwards for few samples; only numbers of equally many samples compare.

    Args:
        features: `(N, D)`.
        reference: `(M, D)`, or their statistics.

    Raises:
        ValueError: If a set has fewer than two samples.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = [FeatureStatistics.of(each) if isinstance(each, torch.Tensor) else each for each in (features, reference)]
    statistics = [{"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in pair]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def over_seeds(distances: Sequence[float]) -> dict[str, float | None]:
    """The distance of one set of samples, or the mean of several sets, their standard deviation and each of them.

    Args:
        distances: S numbers, one for each set.

    Returns:
        `fid`; of several sets also `fid_std` (unbiased, over S - 1) and `fid_1` to `fid_S`.
    """
    if len(distances) == 1:
        return {"fid": distances[0]}
    found = torch.tensor(distances, dtype=torch.float64)
    each = {f"fid_{number}": distance for number, distance in enumerate(distances, 1)}
    return {"fid": found.mean().item(), "fid_std": found.std().item(), **each}


def fid(subject: Subject) -> dict[str, float | None]:
    """Fréchet distance to the reference images: of all sets of samples, each from seeds of its own."""
    assert subject.reference is not None
    distances = []
    for features in subject.feature_sets():
        if subject.is_main:
            distances.append(frechet_distance(features, subject.reference))
    return over_seeds(distances) if subject.is_main else {}


FID = Metric(
    fid,
    {"fid": Column("FID", better="lower", spread="fid_std", plotted=True)},
    needs=("images", "reference"),
    over_dinov2={"fid": "FD-DINOv2"},
)

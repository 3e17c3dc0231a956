"""Fréchet distance of two sets of features: FID where they are Inception's.

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6.
"""

from __future__ import annotations

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


def fid(subject: Subject) -> dict[str, float | None]:
    """Fréchet distance to the reference images."""
    assert subject.reference is not None
    features = subject.features
    return {"fid": frechet_distance(features, subject.reference)} if subject.is_main else {}


FID = Metric(fid, {"fid": Column("FID", better="lower", plotted=True)}, needs=("images", "reference"))

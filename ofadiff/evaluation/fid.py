"""Fréchet distance of two sets of features: FID where they are Inception's.

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6.
"""

from __future__ import annotations

import torch

from ofadiff.evaluation.feature_statistics import FeatureStatistics


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

"""Fréchet distance of two sets of features: FID where they are Inception's.

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6.
"""

from __future__ import annotations

import torch


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """||μ1 - μ2||² + Tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), as torch-fidelity computes it.

    Biased upwards for few samples; only numbers of equally many samples compare.

    Args:
        features: `(N, D)`.
        reference: `(M, D)`.

    Raises:
        ValueError: If a set has fewer than two samples.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    for name, values in (("features", features), ("reference", reference)):
        if len(values) < 2:
            raise ValueError(f"{name} has {len(values)} samples; a covariance takes at least 2")
    statistics = [fid_features_to_statistics(values.double()) for values in (features, reference)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]

"""The table of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ofadiff.evaluation.metrics.answers import ANSWER_ERROR
from ofadiff.evaluation.metrics.clip_score import CLIP_SCORE
from ofadiff.evaluation.metrics.consistency import PSNR, SSIM
from ofadiff.evaluation.metrics.costs import LATENCY, MACS, MEMORY
from ofadiff.evaluation.metrics.fid import FID
from ofadiff.evaluation.metrics.kid import KID
from ofadiff.evaluation.metrics.metric import Metric
from ofadiff.evaluation.metrics.mind import MIND
from ofadiff.evaluation.metrics.precision_recall import PRECISION, RECALL
from ofadiff.reading.arguments import check_choice

# A new metric is one file and one line here.
METRICS: dict[str, Metric] = {
    "macs": MACS,
    "latency": LATENCY,
    "memory": MEMORY,
    "fid": FID,
    "kid": KID,
    "mind": MIND,
    "precision": PRECISION,
    "recall": RECALL,
    "clip_score": CLIP_SCORE,
    "psnr": PSNR,
    "ssim": SSIM,
    "answer_error": ANSWER_ERROR,
}


def choose_metrics(names: Sequence[str] | None, missing: Mapping[str, str]) -> list[str]:
    """Metrics by name, or all that can be had.

    Args:
        names: Names in `METRICS`, or None for every one that needs nothing that is missing.
        missing: Needs that cannot be met, each with the reason.

    Raises:
        ValueError: If a metric does not exist, or needs what is missing.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if not any(need in missing for need in metric.needs)]
    for name in names:
        check_choice("metric", name, METRICS)
        for need in METRICS[name].needs:
            if need in missing:
                raise ValueError(f"the metric {name!r} cannot be measured: {missing[need]}")
    return list(dict.fromkeys(names))

"""The CLIP score as a metric."""

from __future__ import annotations

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column


def clip_score(subject: Subject) -> dict[str, float | None]:
    """Mean cosine of images and their prompts."""
    assert subject.clip is not None
    scores = subject.clip.scores(subject.images, subject.arguments["prompt"], subject.batch_size)
    return {"clip_score": subject.gather(scores).double().mean().item()}


CLIP_SCORE = Metric(
    clip_score,
    {"clip_score": Column("CLIP score", digits=4, better="higher", plotted=True)},
    needs=("images", "prompts"),
)

"""The CLIP score as a metric."""

from __future__ import annotations

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column


def clip_score(subject: Subject) -> dict[str, float | None]:
    """Mean cosine of images and their prompts; of videos over all frames."""
    assert subject.clip is not None
    prompts = [prompt for prompt in subject.arguments["prompt"] for _ in range(subject.frames)]
    return {"clip_score": subject.mean_of(subject.clip.scores(subject.pictures, prompts, subject.batch_size))}


CLIP_SCORE = Metric(
    clip_score,
    {"clip_score": Column("CLIP score", digits=4, better="higher", plotted=True)},
    needs=("images", "prompts"),
)

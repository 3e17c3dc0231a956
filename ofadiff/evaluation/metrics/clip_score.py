"""The CLIP score as a metric."""

from __future__ import annotations

from ofadiff.evaluation.called import Frames
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column


def clip_score(subject: Subject) -> dict[str, float | None]:
    """Mean cosine of images and their prompts; of videos over all frames."""
    assert subject.clip is not None
    images, prompts = Frames(subject.images, subject.frames), subject.arguments["prompt"]
    of_frames = [prompt for prompt in prompts for _ in range(subject.frames)]
    scores = subject.clip.scores(images, of_frames, subject.batch_size)
    return {"clip_score": subject.gather(scores.view(-1, subject.frames).mean(dim=1)).double().mean().item()}


CLIP_SCORE = Metric(
    clip_score,
    {"clip_score": Column("CLIP score", digits=4, better="higher", plotted=True)},
    needs=("images", "prompts"),
)

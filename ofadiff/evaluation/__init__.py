"""What every size of a checkpoint is worth: quality, agreement with the teacher, cost, and one report of it all."""

from ofadiff.evaluation.clip_score import ClipScorer
from ofadiff.evaluation.evaluator import evaluate
from ofadiff.evaluation.extractors import register_extractor
from ofadiff.evaluation.metrics import METRICS, Metric, Subject
from ofadiff.evaluation.prompts import read_prompts
from ofadiff.evaluation.report import VALIDATION_LOSS, Column, Report
from ofadiff.evaluation.sampling import generate

__all__ = [
    "METRICS",
    "VALIDATION_LOSS",
    "ClipScorer",
    "Column",
    "Metric",
    "Report",
    "Subject",
    "evaluate",
    "generate",
    "read_prompts",
    "register_extractor",
]

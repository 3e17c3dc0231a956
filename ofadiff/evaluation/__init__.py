"""What every size of a checkpoint is worth: quality, agreement with the teacher, cost, and one report of it all."""

from ofadiff.data.prompts import read_prompts
from ofadiff.evaluation.evaluator import evaluate
from ofadiff.evaluation.metrics.clip_scorer import ClipScorer
from ofadiff.evaluation.metrics.extractors import register_extractor
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.metrics.table import METRICS
from ofadiff.evaluation.report.report import Report
from ofadiff.evaluation.report.rows import VALIDATION_LOSS, Column
from ofadiff.evaluation.sampling import generate
from ofadiff.evaluation.settings import EvaluationSettings

__all__ = [
    "METRICS",
    "VALIDATION_LOSS",
    "ClipScorer",
    "Column",
    "EvaluationSettings",
    "Metric",
    "Report",
    "Subject",
    "evaluate",
    "generate",
    "read_prompts",
    "register_extractor",
]

"""The metrics: what they look at, the table of them, and one file for each."""

from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.metrics.table import METRICS, choose_metrics

__all__ = ["METRICS", "Metric", "Subject", "choose_metrics"]

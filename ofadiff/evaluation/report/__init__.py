"""The report: its rows, how they read, and the files that show them."""

from ofadiff.evaluation.report.report import Report
from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import (
    JOINT,
    MISSED_NOTE,
    PARAMETERS,
    REACHED,
    TEACHER,
    VALIDATION_LOSS,
    Column,
    Row,
)

__all__ = [
    "JOINT",
    "MISSED_NOTE",
    "PARAMETERS",
    "REACHED",
    "TEACHER",
    "VALIDATION_LOSS",
    "Column",
    "Report",
    "Results",
    "Row",
]

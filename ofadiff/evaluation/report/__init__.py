"""The report: its rows, how they read, and the files that show them."""

from ofadiff.evaluation.report.report import Report
from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import VALIDATION_LOSS, Column, Row

__all__ = ["VALIDATION_LOSS", "Column", "Report", "Results", "Row"]

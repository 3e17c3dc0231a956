"""Correction in closed form: cut branches give what the original's give, by least squares and without gradients."""

from ofadiff.correction.correct import correct_readers

__all__ = ["correct_readers"]

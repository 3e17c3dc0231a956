"""Extracted models: a subnet as a smaller dense diffusers model that stands alone."""

from ofadiff.extraction.extracted_model import ExtractedModel, extracted_class, extracted_class_by_name
from ofadiff.extraction.reader import load_extracted
from ofadiff.extraction.subnet import extract

__all__ = ["ExtractedModel", "extract", "extracted_class", "extracted_class_by_name", "load_extracted"]

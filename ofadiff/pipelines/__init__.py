"""Sampling at any size."""

from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.pipelines.ofa_pipeline import OFAPipeline

__all__ = ["ClassConditionalDDPMPipeline", "OFAPipeline"]

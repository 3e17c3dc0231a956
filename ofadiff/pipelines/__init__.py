"""Sampling at any size."""

from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.pipelines.ofa_pipeline import OFAPipeline
from ofadiff.size_schedule import SizeSchedule

__all__ = ["ClassConditionalDDPMPipeline", "OFAPipeline", "SizeSchedule"]

"""Compress a pretrained diffusion model once, for every device."""

import importlib
from typing import Any

# diffusers asks the library of an extracted model for the base class that says how to load it.
from diffusers import ModelMixin as ModelMixin

from ofadiff import old_paths
from ofadiff.allocation import allocate
from ofadiff.basis.rotation import rotate_attention
from ofadiff.correction import correct_readers
from ofadiff.evaluation import evaluate
from ofadiff.extraction import extracted_class_by_name
from ofadiff.importance import score_channels
from ofadiff.pipelines import OFAPipeline, SizeSchedule
from ofadiff.pipelines.recording import record
from ofadiff.pipelines.schedule_search import find_schedule
from ofadiff.supernet import Supernet
from ofadiff.unet_elastic import find_channel_groups

__all__ = [
    "OFAPipeline",
    "SizeSchedule",
    "Supernet",
    "allocate",
    "correct_readers",
    "evaluate",
    "find_channel_groups",
    "find_schedule",
    "record",
    "rotate_attention",
    "score_channels",
]

old_paths.install()


def __getattr__(name: str) -> Any:
    if f"ofadiff.{name}" in old_paths.MOVED:
        return importlib.import_module(f"ofadiff.{name}")
    # diffusers looks up the classes of extracted models here: ofadiff.OFAUNet2DModel and the like.
    return extracted_class_by_name(name)

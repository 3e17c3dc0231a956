"""Pipelines to sample from, by their folders or hub names."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from ofadiff.denoisers.pipelines import class_count
from ofadiff.pipelines import ClassConditionalDDPMPipeline, OFAPipeline
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.pipeline_folder import local_folder
from ofadiff.storage.strangers import check_pipeline


def pipeline_folder(name: str) -> str:
    """The folder of a pipeline; a hub name is downloaded. Raises ValueError if it is neither."""
    try:
        folder = local_folder(name, {})
    except (OSError, ValueError):
        folder = Path(name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} holds no model_index.json, so it is no pipeline folder, and the hub gave none")
    return str(folder)


def open_pipeline(folder: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """An OFA checkpoint with all its sizes, or a plain pipeline, on a device."""
    if any(Path(folder).glob(f"*/{CONFIG_NAME}")):
        pipeline = OFAPipeline.from_pretrained(folder)
    else:
        check_pipeline(folder)
        with in_one_sentence(f"{folder} cannot be loaded"):
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        if type(pipeline) is DDPMPipeline and class_count(pipeline.unet) is not None:
            pipeline = ClassConditionalDDPMPipeline(**pipeline.components)
    return pipeline.to(device, dtype)


def load_pipeline(folder: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """Such a pipeline to evaluate: without its safety checker."""
    pipeline = open_pipeline(folder, dtype, device)
    if pipeline.components.get("safety_checker") is not None:
        # An image that it flags comes out black, and would count in every metric.
        pipeline.register_modules(safety_checker=None)
    return pipeline

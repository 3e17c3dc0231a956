"""How a run draws the images of its validations: of prompts, or of classes in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image

from ofadiff.denoisers.kind import CALLS, CAPTIONS, CLASSES
from ofadiff.denoisers.pipelines import class_count
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.runs.run import Run
from ofadiff.runs.settings import Watching


def of_prompts(run: Run, generators: list[torch.Generator]) -> list[Image.Image]:
    """One image for each validation prompt, at the size that is set."""
    assert run.pipeline is not None and run.encode is not None
    watching, cached = run.settings.watching, run.settings.captions.cache_dir_latents
    run.encode.to(run.accelerator.device)
    resolution = run.original.resolution(run.settings.data.resolution)
    options = {"num_inference_steps": watching.validation_inference_steps, **run.original.kind.call_options}
    options |= {"height": resolution, "width": resolution}
    if watching.guidance_scale is not None:
        options["guidance_scale"] = watching.guidance_scale
    images = [
        run.pipeline(prompt, generator=generator, **options).images[0]
        for prompt, generator in zip(watching.validation_prompts or (), generators, strict=True)
    ]
    if cached:
        run.encode.to("cpu")
    return images


def of_classes(run: Run, generators: list[torch.Generator]) -> list[Image.Image]:
    """One image for each generator, of a class in turn where there are classes, at the size that is set."""
    assert run.pipeline is not None and run.encode is not None
    watching, denoiser = run.settings.watching, run.pipeline.components[run.original.component]
    scheduler = DDIMScheduler.from_config(run.original.scheduler)
    options: dict[str, Any] = {
        "generator": generators,
        "num_inference_steps": watching.validation_inference_steps,
    }
    if run.original.classes is None:
        pipeline: Any = DDPMPipeline(denoiser, scheduler)
        options["batch_size"] = len(generators)
    else:
        classes = class_count(denoiser) or len(generators)
        options["class_labels"] = [column % classes for column in range(len(generators))]
        if run.encode.vae is None:
            pipeline = ClassConditionalDDPMPipeline(denoiser, scheduler)
        else:
            run.encode.to(run.accelerator.device)
            pipeline = type(run.pipeline)(**{**run.pipeline.components, "scheduler": scheduler})
            options["guidance_scale"] = 1.0 if watching.guidance_scale is None else watching.guidance_scale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**options).images


def of_calls(run: Run, generators: list[torch.Generator]) -> list[Image.Image]:
    """None: the pipeline that would draw is not loaded."""
    return []


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        images: (run, generators) -> one image for each generator.
        columns: (what is asked for) -> how many.
    """

    images: Callable[[Run, list[torch.Generator]], list[Image.Image]]
    columns: Callable[[Watching], int]


# By what the denoiser is conditioned on.
DRAW = {
    CAPTIONS: Drawing(of_prompts, lambda watching: len(watching.validation_prompts or ())),
    CLASSES: Drawing(of_classes, lambda watching: watching.num_validation_images or 0),
    CALLS: Drawing(of_calls, lambda watching: 0),
}

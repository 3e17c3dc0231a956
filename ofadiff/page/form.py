"""What a page asks for: whatever of it a pipeline's call takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline

from ofadiff.denoisers.pipelines import class_count, denoiser_of
from ofadiff.reading.json_file import is_kind

# What a call can be given by a page; it has to need nothing else.
FILLED = ("prompt", "class_labels", "generator", "num_inference_steps", "guidance_scale", "size")

# Arguments of calls that begin with pictures, and the classes that can do without.
PICTURES = ("image", "images", "control_image", "input_images", "mask_image", "video", "control_video")
WITHOUT_PICTURES = {
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxKontextPipeline",
    "GlmImagePipeline",
    "OmniGenPipeline",
}

# Arguments of calls that give no picture but a video.
FRAMES = ("num_frames", "video_length", "frames")

# Steps that a page begins with at most, and those that it takes.
STEPS, MOST_STEPS = 50, 1000

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """What whoever looks at the page asks for; None is what the call does not take, or what is the pipeline's own.

    Attributes:
        seed: Of the noise.
        prompt: Text to draw.
        label: Class to draw.
        steps: Denoising steps.
        guidance: Guidance scale.
    """

    seed: int
    prompt: str | None = None
    label: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, with a new generator, on the CPU, so that devices draw the same noise."""
        given: dict[str, Any] = {
            "prompt": self.prompt,
            "class_labels": None if self.label is None else [self.label],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        return {
            **{name: value for name, value in given.items() if value is not None},
            "generator": torch.Generator().manual_seed(self.seed),
        }


@dataclass(frozen=True)
class Form:
    """What a pipeline's call takes of a prompt, a class, steps and a guidance scale.

    Attributes:
        prompt: Whether it takes a prompt.
        classes: The classes to choose from, each by its number with what it is called; none where there are no classes.
        steps: Denoising steps to begin with; None where the call does not take their number.
        guided: Whether it takes a guidance scale.
        guidance: The call's own guidance scale, if it says one.
    """

    prompt: bool
    classes: Mapping[int, str]
    steps: int | None
    guided: bool
    guidance: float | None

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> Form:
        """The form for a pipeline.

        Raises:
            ValueError: If its call needs something that a page does not ask for, cannot be given a seed, or gives
                videos or sound.
        """
        name = type(pipeline).__name__
        parameters = {
            each: parameter
            for each, parameter in inspect.signature(pipeline.__call__).parameters.items()
            if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        }
        _check(name, parameters)
        steps, guidance = (_default(parameters, each) for each in ("num_inference_steps", "guidance_scale"))
        return cls(
            prompt="prompt" in parameters,
            classes=_classes(pipeline, parameters),
            steps=min(steps or STEPS, STEPS) if "num_inference_steps" in parameters else None,
            guided="guidance_scale" in parameters,
            guidance=guidance,
        )

    def request(self, prompt: Any, label: Any, seed: Any, steps: Any, guidance: Any) -> Request:
        """What was asked for, of fields that may hold anything; those that the call does not take are left out.

        Raises:
            ValueError: If something cannot be: says in one sentence what, and what could be.
        """
        if self.prompt and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError("the prompt is empty; write what the picture shall show")
        if self.classes and label not in self.classes:
            raise ValueError(f"the class is {label!r}; choose one of the list")
        if self.guided and guidance is not None and not is_kind(guidance, float):
            raise ValueError(
                f"the guidance scale is {guidance!r}; it must be a number, or empty for the pipeline's own"
            )
        return Request(
            seed=_whole("the seed", seed, 0, LARGEST_SEED),
            prompt=prompt if self.prompt else None,
            label=label if self.classes else None,
            steps=None if self.steps is None else _whole("the number of steps", steps, 1, MOST_STEPS),
            guidance=guidance if self.guided else None,
        )


def _check(name: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raises ValueError if a page cannot make calls of a pipeline class with these parameters."""
    if any(each in FRAMES for each in parameters):
        raise ValueError(f"a {name} gives videos, and the page shows pictures alone; `ofadiff evaluate` takes videos")
    if any("audio" in each.split("_") for each in parameters):
        raise ValueError(f"a {name} gives sound, and the page shows pictures alone")
    needed = [
        each
        for each, parameter in parameters.items()
        if (parameter.default is inspect.Parameter.empty and each not in FILLED)
        or (each in PICTURES and name not in WITHOUT_PICTURES)
    ]
    if needed:
        raise ValueError(
            f"the call of a {name} takes {' and '.join(needed)}, which the page does not ask for; it asks for a "
            "prompt, or a class, with a seed, steps and a guidance scale"
        )
    if "generator" not in parameters:
        raise ValueError(f"the call of a {name} takes no generator, so no picture would depend on the seed")


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    """A parameter's number, if it is there and has one."""
    default = parameters[name].default if name in parameters else None
    return default if is_kind(default, float) else None


def _classes(pipeline: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter]) -> dict[int, str]:
    """The classes that a pipeline's call takes, by number, each with its name if it has one."""
    if "class_labels" not in parameters:
        return {}
    count = class_count(denoiser_of(pipeline))
    if count is None:
        if parameters["class_labels"].default is None:
            return {}
        raise ValueError(
            f"the call of a {type(pipeline).__name__} takes classes, and its denoiser does not say how many"
        )
    names: dict[int, list[str]] = {}
    if isinstance(pipeline, DiTPipeline):
        for name, number in pipeline.labels.items():
            names.setdefault(int(number), []).append(name)
    return {number: " ".join([str(number), ", ".join(names.get(number, []))]).strip() for number in range(count)}


def _whole(what: str, value: Any, low: int, high: int) -> int:
    """A whole number in a range, which a field may hold as a float."""
    if is_kind(value, float) and value == int(value) and low <= value <= high:
        return int(value)
    shown = "empty" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else repr(value)
    raise ValueError(f"{what} is {shown}; it must be a whole number from {low} to {high}")

"""What an image depends on, as it is written beside the images and into the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.evaluation.sampling import Sampling, call_parameters
from ofadiff.pipelines.calls import described
from ofadiff.size_schedule import SizeSchedule
from ofadiff.storage.digest import digest_of_weights


def image_protocol(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    resolution: str,
    digests: dict[nn.Module, str],
    added: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the images of a pipeline depend on, by name; image i is that of the i-th seed.

    Args:
        pipeline: What draws them.
        sampling: How.
        resolution: Resolution of the images, such as `"64x64"`.
        digests: Digests of components other than denoisers, which sizes share; gets those that are new.
        added: What the calls of these images take beside all else; a kept schedule's name stands for its sizes.

    Raises:
        ValueError: If the arguments per image cannot be written as JSON.
    """
    denoiser = denoiser_of(pipeline)
    models = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    for model in models.values():
        if model is not denoiser and model not in digests:
            digests[model] = digest_of_weights(model)
    known = {**digests, denoiser: digest_of_weights(denoiser)}
    scheduler = pipeline.components.get("scheduler")
    settings = {} if scheduler is None else {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    protocol = {
        "pipeline": type(pipeline).__name__,
        **{f"weights of {name}": known[model] for name, model in models.items()},
        "precision": str(denoiser.dtype).removeprefix("torch."),
        "resolution": resolution,
        "denoising steps": sampling.num_inference_steps,
        **call_protocol(pipeline, sampling.call_arguments),
        **{name: _digest_of_values(name, list(values)) for name, values in sampling.arguments.items()},
        **({} if sampling.calls is None else {"calls": _digest_of_values("calls", described(sampling.calls))}),
        **{f"variant's {name}": described(_sizes_of(pipeline, value)) for name, value in added.items()},
        "first seed": sampling.seed,
        "scheduler": type(scheduler).__name__,
        **{f"scheduler's {name}": value for name, value in settings.items()},
    }
    return json.loads(json.dumps(protocol, default=str))  # as it comes back from the file


def _sizes_of(pipeline: Any, value: Any) -> Any:
    schedule = pipeline.schedules.get(value, value) if isinstance(value, str) else value
    return list(schedule) if isinstance(schedule, SizeSchedule) else value


def call_protocol(pipeline: DiffusionPipeline, call_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What every image is called with; the guidance scale also where it is the pipeline's own."""
    parameters = call_parameters(pipeline)
    own = {name: parameters[name].default for name in ("guidance_scale",) if name in parameters}
    return {
        name.replace("_", " "): value if isinstance(value, int | float | str) else str(value)
        for name, value in {**own, **call_arguments}.items()
    }


def _digest_of_values(name: str, values: list[Any]) -> str:
    try:
        content = json.dumps(values).encode()
    except TypeError as error:
        raise ValueError(f"images are kept with JSON arguments only, and {name!r} is none: {error}") from error
    return f"{len(values)}, SHA-256 {hashlib.sha256(content).hexdigest()}"

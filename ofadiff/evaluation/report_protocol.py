"""How the numbers of a report were made, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.dtypes import dtype_name
from ofadiff.evaluation.image_protocol import call_protocol
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.table import METRICS
from ofadiff.evaluation.preparation import Instruments
from ofadiff.evaluation.reference import RESIZE, Reference
from ofadiff.evaluation.sampling import Sampling
from ofadiff.evaluation.settings import EvaluationSettings
from ofadiff.pipelines import OFAPipeline
from ofadiff.profiling.timing import REPEATS, ROUNDS, processor_name


def describe_machine(device: torch.device) -> dict[str, str]:
    """The processor that does the work, and the versions of what runs on it."""
    return {
        "processor": processor_name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def reference_protocol(
    reference: Any, real: Reference | None, statistics: FeatureStatistics | None
) -> dict[str, str | int]:
    """What the numbers were compared with."""
    if real is not None:
        return {"reference images": len(real), "reference resized": RESIZE}
    if statistics is None:
        return {}
    images = "images" if statistics.count is None else f"{statistics.count} images"
    return {
        "reference": f"statistics of {images}, {Path(reference).name}",
        "reference resized": statistics.resize or "not stated in the statistics",
    }


def _last_part(name_or_path: str | Path) -> str:
    """A hub repository as it is, of an absolute path the last part: reports travel, machines don't."""
    return Path(name_or_path).name if Path(name_or_path).is_absolute() else str(name_or_path)


@dataclass(frozen=True)
class Made:
    """What came of an evaluation: its metrics, images of each model, their resolution, and how many processes."""

    names: Sequence[str]
    count: int
    resolution: str
    processes: int


def distance_protocol(settings: EvaluationSettings, made: Made) -> dict[str, str]:
    """What FID was taken over, if over several seeds, and which neighbours precision and recall look at."""
    protocol = {}
    if settings.fid_seeds > 1:
        sets, last = settings.fid_seeds, settings.seed + settings.fid_seeds * made.count - 1
        protocol["FID"] = (
            f"mean ± standard deviation over {sets} sets of {made.count} samples, seeds {settings.seed} to {last}; "
            "other metrics look at the first set"
        )
    if "precision" in made.names or "recall" in made.names:
        protocol["precision and recall"] = f"k = {settings.prc_neighborhood} nearest neighbours"
    return protocol


def in_words(added: Mapping[str, Any]) -> str:
    """Arguments of a call as they are written in one."""
    return ", ".join(f"{name}={value!r}" for name, value in added.items())


def report_protocol(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    settings: EvaluationSettings,
    instruments: Instruments,
    made: Made,
    reference: Any,
) -> dict[str, str | int | float]:
    """Everything that a reader needs to make the numbers again; what does not apply is left out."""
    features, clip = instruments.features, instruments.clip
    needs = {need for name in made.names for need in METRICS[name].needs}
    recordings = settings.recordings
    component = "" if recordings is None else recordings.description["component"]
    batch = f"batch of {settings.cost_batch_size}" if recordings is None else f"a recorded call of {recordings[0].rows}"
    forward = f"one forward of the denoiser, {batch}"
    several = "es" if made.processes > 1 else ""
    protocol = {
        "samples per size": made.count if "images" in needs else None,
        "resolution": f"{made.resolution} pixels" if made.resolution else None,
        "denoising steps": settings.num_inference_steps if made.resolution else None,
        "calls": None if sampling.calls is None else min(made.count, len(sampling.calls)),
        "recordings": None if recordings is None else f"{len(recordings)} calls of the {component}",
        **(call_protocol(pipeline, sampling.call_arguments) if sampling.calls is None else {}),
        **{f"variant {name}": in_words(added) for name, added in (settings.variants or {}).items()},
        "prompts": min(made.count, len(sampling.arguments["prompt"])) if "prompt" in sampling.arguments else None,
        "seeds": f"{settings.seed} to {settings.seed + made.count - 1}, one per image" if made.resolution else None,
        **distance_protocol(settings, made),
        "batches": f"{settings.batch_size} images, {made.processes} process{several}" if made.resolution else None,
        "scheduler": type(pipeline.components["scheduler"]).__name__ if "scheduler" in pipeline.components else None,
        "budget": pipeline.subnets.budget if isinstance(pipeline, OFAPipeline) else None,
        "features": features.name if features else None,
        "resized for the features": features.resize if features else None,
        **reference_protocol(reference, instruments.real, instruments.statistics if features else None),
        "CLIP score": f"mean cosine (w = 1), {_last_part(settings.clip_model)}" if clip else None,
        "latency": (
            f"{forward}: median of {ROUNDS} rounds over all models, {REPEATS} forwards each"
            if "latency" in made.names
            else None
        ),
        "memory": (
            f"peak of {forward}, {pipeline.device.type.upper()}: its weights and what PyTorch allocates"
            if "memory" in made.names
            else None
        ),
        "number format": dtype_name(denoiser_of(pipeline).dtype),
        **describe_machine(pipeline.device),
        "command": settings.command,
    }
    return {name: value for name, value in protocol.items() if value is not None}

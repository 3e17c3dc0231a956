"""One report over every size of a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ofadiff.cost import count_macs, count_parameters, example_inputs
from ofadiff.evaluation.clip_score import DEFAULT_CLIP, ClipScorer
from ofadiff.evaluation.extractors import FeatureExtractor
from ofadiff.evaluation.metrics import METRICS, Subject, choose_metrics
from ofadiff.evaluation.reference import Reference
from ofadiff.evaluation.report import PARAMETERS, REACHED, TEACHER, Column, Report, Row
from ofadiff.evaluation.sampling import call_parameters, check_arguments, default_arguments, evaluation_mode, generate
from ofadiff.pipelines import OFAPipeline

DENOISERS = ("unet", "transformer")
# Fewer images than this have no KID.
FEWEST = 4


def evaluate(
    pipeline: DiffusionPipeline,
    *,
    reference: str | Path | torch.Tensor | None = None,
    teacher: DiffusionPipeline | None = None,
    sizes: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    num_samples: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    num_inference_steps: int = 50,
    arguments: Mapping[str, Sequence[Any]] | None = None,
    call_arguments: Mapping[str, Any] | None = None,
    extractor: str = "inception",
    clip_model: str | Path = DEFAULT_CLIP,
    cost_batch_size: int = 1,
    num_shown: int = 10,
    title: str = "One model, every size",
    command: str | None = None,
    progress: bool = True,
) -> Report:
    """Measures every size of a pipeline, and its teacher, from the same seeds.

    What is measured is the extracted model of each size: what ships.

    Args:
        pipeline: An `OFAPipeline`, or any other pipeline for a report of one row.
        reference: Real images for FID and KID: a folder, or uint8 `(N, 3, H, W)`.
        teacher: Pipeline of the original model, with the same scheduler.
        sizes: Which sizes, all by default.
        metrics: Names in `METRICS`; by default all that can be had from what is given.
        num_samples: Images sampled per size, if a metric looks at images.
        batch_size: Images per call of a pipeline.
        seed: Seed of the first image, see `generate`.
        num_inference_steps: Denoising steps.
        arguments: What the pipeline's call takes for each image, see `generate`; prompts are `{"prompt": [...]}`.
        call_arguments: What the call takes once, for all images, such as `{"guidance_scale": 7.5}`.
        extractor: Features for FID and KID: `"inception"`, another of torch-fidelity's, or a registered one.
        clip_model: CLIP for the CLIP score of images and prompts: a folder or a hub repository, see `ClipScorer`.
        cost_batch_size: Images of the forward whose latency and memory are measured.
        num_shown: Images per size that the report shows.
        title: The report's.
        command: The command line that makes this report, if there is one.
        progress: Whether to show progress bars.

    Returns:
        The report, the teacher first, then the sizes from the largest down.

    Raises:
        ImportError: If torch-fidelity, scikit-image or transformers is needed and not installed.
        ValueError: Before any sampling, if a metric, size or extractor does not exist, a metric lacks what it needs, a
            pipeline lacks prompts or takes no such argument, the teacher has another scheduler, or reference images or
            the CLIP model cannot be read.

    Example:
        >>> report = evaluate(OFAPipeline.from_pretrained("my-ofa-checkpoint"), reference="images", num_samples=10_000)
        >>> report.write("report")
    """
    has_prompts = arguments is not None and "prompt" in arguments
    names = choose_metrics(metrics, _missing(pipeline, reference is not None, teacher is not None, has_prompts))
    needs = {need for name in names for need in METRICS[name].needs}
    sizes = _choose_sizes(pipeline, sizes)
    if teacher is not None:
        _check_schedulers(teacher, pipeline)
    arguments = default_arguments(pipeline) if arguments is None else arguments
    call_arguments = {} if call_arguments is None else call_arguments
    for each in (pipeline, teacher):
        if each is not None:
            _denoiser(each)  # there has to be one
            check_arguments(each, arguments, call_arguments)
    count = num_samples if "images" in needs else num_shown
    real = Reference(reference, progress) if reference is not None and "reference" in needs else None
    if real is not None and min(count, len(real)) < FEWEST:
        raise ValueError(
            f"there are {count} samples and {len(real)} reference images; FID and KID take {FEWEST} of each"
        )
    features = FeatureExtractor(extractor, pipeline.device) if real is not None else None
    clip = ClipScorer(str(clip_model), pipeline.device) if "prompts" in needs else None
    real_features = teacher_images = None

    timed = not {"latency", "memory"}.isdisjoint(names)
    budget = _budget(pipeline, teacher)
    columns: dict[str, Column] = {} if budget is None else {"reached": REACHED}
    columns["params"] = PARAMETERS
    for name in names:
        columns.update(METRICS[name].columns)
    report = Report(title, columns)

    for row, stand_alone in _subjects(pipeline, teacher, sizes):
        denoiser = _denoiser(stand_alone)
        images = generate(
            stand_alone,
            count,
            batch_size=batch_size,
            seed=seed,
            num_inference_steps=num_inference_steps,
            arguments=arguments,
            call_arguments=call_arguments,
            progress=progress,
            description=f"Sampling {row.label}",
        )
        if real is not None and features is not None and real_features is None:
            real_features = features.features(real.images(*images.shape[-2:]), batch_size, progress)
        subject = Subject(
            denoiser=denoiser,
            images=images,
            arguments={name: [values[i % len(values)] for i in range(count)] for name, values in arguments.items()},
            teacher_images=teacher_images,
            reference=real_features,
            extractor=features,
            clip=clip,
            batch_size=batch_size,
            cost_batch_size=cost_batch_size,
        )
        row.values["params"] = count_parameters(denoiser)
        if budget is not None:
            spent, full = budget
            row.values["reached"] = spent(denoiser) / full
        with evaluation_mode(stand_alone):
            for name in names:
                row.values.update(METRICS[name].measure(subject))
        report.add_row(row, images[:num_shown])
        if row.series == TEACHER:
            teacher_images = images

    protocol = {
        "samples per size": count if "images" in needs else None,
        "resolution": f"{images.shape[-1]}x{images.shape[-2]} pixels",
        "denoising steps": num_inference_steps,
        **_call_protocol(pipeline, call_arguments),
        "prompts": min(count, len(arguments["prompt"])) if "prompt" in arguments else None,
        "seeds": f"{seed} to {seed + count - 1}, one per image",
        "scheduler": type(pipeline.components["scheduler"]).__name__ if "scheduler" in pipeline.components else None,
        "budget": pipeline.subnets.budget if isinstance(pipeline, OFAPipeline) else None,
        "features": extractor if features else None,
        "reference images": len(real) if real else None,
        "CLIP score": f"mean cosine (w = 1), {_last_part(clip_model)}" if clip else None,
        "latency and memory": f"one forward of the denoiser, batch of {cost_batch_size}" if timed else None,
        "precision": str(_denoiser(pipeline).dtype).removeprefix("torch."),
        **describe_machine(pipeline.device),
        "command": command,
    }
    report.protocol = {name: value for name, value in protocol.items() if value is not None}
    return report


def describe_machine(device: torch.device) -> dict[str, str]:
    """The processor that does the work, and the versions of what runs on it."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        processor = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "processor": processor,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _subjects(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline | None, sizes: Sequence[float]
) -> Iterator[tuple[Row, DiffusionPipeline]]:
    """Rows to fill, each with its stand-alone pipeline; one extracted model at a time."""
    if teacher is not None:
        yield Row(TEACHER, TEACHER), teacher
    if not isinstance(pipeline, OFAPipeline):
        yield Row("model"), pipeline
        return
    for size in sizes:
        extracted = pipeline.extract(size)
        yield Row(str(size), size=size), extracted


def _call_protocol(pipeline: DiffusionPipeline, call_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What every image was called with; the guidance scale also where it is the pipeline's own."""
    parameters = call_parameters(pipeline)
    own = {name: parameters[name].default for name in ("guidance_scale",) if name in parameters}
    return {
        name.replace("_", " "): value if isinstance(value, int | float | str) else str(value)
        for name, value in {**own, **call_arguments}.items()
    }


def _last_part(name_or_path: str | Path) -> str:
    """A hub repository as it is, of an absolute path the last part: reports travel, machines don't."""
    return Path(name_or_path).name if Path(name_or_path).is_absolute() else str(name_or_path)


def _missing(pipeline: DiffusionPipeline, has_reference: bool, has_teacher: bool, has_prompts: bool) -> dict[str, str]:
    """What metrics may need and cannot have, each with the reason."""
    missing = {}
    if not has_reference:
        missing["reference"] = "there are no reference images"
    if not has_teacher:
        missing["teacher"] = "there is no teacher"
    if not has_prompts:
        missing["prompts"] = "there are no prompts"
    try:
        example_inputs(_denoiser(pipeline))
    except ValueError as error:
        missing["inputs"] = str(error)
    return missing


def _choose_sizes(pipeline: DiffusionPipeline, sizes: Sequence[float] | None) -> list[float]:
    if not isinstance(pipeline, OFAPipeline):
        if sizes:
            raise ValueError(f"sizes are {list(sizes)}, but this {type(pipeline).__name__} is no OFAPipeline")
        return []
    chosen = pipeline.sizes if sizes is None else [pipeline.subnets.find(size).size for size in sizes]
    if not chosen:
        raise ValueError(f"sizes is empty; choose some of {', '.join(f'{size:g}' for size in pipeline.sizes)}")
    return sorted(set(chosen), reverse=True)


def _check_schedulers(teacher: DiffusionPipeline, pipeline: DiffusionPipeline) -> None:
    """Images are compared seed by seed, so the samplers have to be the same."""
    ours, theirs = (each.components.get("scheduler") for each in (pipeline, teacher))
    if ours is None or theirs is None:
        return
    configs = [{k: v for k, v in each.config.items() if not k.startswith("_")} for each in (ours, theirs)]
    if type(ours) is not type(theirs) or configs[0] != configs[1]:
        raise ValueError(
            f"the teacher samples with {type(theirs).__name__}, the pipeline with {type(ours).__name__}, or with other "
            "settings; give both the same scheduler"
        )


def _budget(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline | None
) -> tuple[Callable[[nn.Module], int], int] | None:
    """What a size is a share of: how it is counted, and how much of it the full model has."""
    if not isinstance(pipeline, OFAPipeline):
        return None if teacher is None else (count_parameters, count_parameters(_denoiser(teacher)))
    if pipeline.subnets.budget == "macs":
        return count_macs, pipeline.subnets.full_macs
    return count_parameters, pipeline.subnets.full_params


def _denoiser(pipeline: DiffusionPipeline) -> Any:
    for name in DENOISERS:
        if isinstance(pipeline.components.get(name), nn.Module):
            return pipeline.components[name]
    raise ValueError(
        f"this {type(pipeline).__name__} has no denoiser: none of its components {', '.join(pipeline.components)} is "
        f"{' or '.join(DENOISERS)}"
    )

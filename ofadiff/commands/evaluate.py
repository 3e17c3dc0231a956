"""`ofadiff evaluate`: one report over every size of a checkpoint."""

from __future__ import annotations

import datetime
import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator, InitProcessGroupKwargs
from cyclopts import Group, Parameter
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.images import Images, image_folder
from ofadiff.data.prompts import read_prompts
from ofadiff.dtypes import DTYPES
from ofadiff.evaluation import METRICS, EvaluationSettings, Report, evaluate
from ofadiff.evaluation.checkpoints import load_pipeline, pipeline_folder
from ofadiff.evaluation.metrics import choose_metrics
from ofadiff.evaluation.metrics.clip_scorer import DEFAULT_CLIP
from ofadiff.evaluation.metrics.extractors import find_extractor
from ofadiff.evaluation.metrics.precision_recall import NEIGHBORHOOD
from ofadiff.evaluation.preparation import check_fid_seeds, missing_reference, read_statistics
from ofadiff.evaluation.saved_images import PROTOCOL_NAME
from ofadiff.pipelines.calls import parsed_value, read_located_calls
from ofadiff.recordings.folder import Recordings, read_description
from ofadiff.sizes import SizeTable
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.output import check_folder
from ofadiff.storage.pipeline_folder import find_denoisers
from ofadiff.values import COUNT, WHOLE, Bundle, one_of

SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}
SAMPLES = "samples"
# Processes wait for the main one while it times models and computes distances.
TIMEOUT = datetime.timedelta(hours=6)


@Parameter(name="*", group=Group.create_ordered("what to measure"))
@dataclass(frozen=True, kw_only=True)
class Measured(Bundle):
    """What is measured."""

    checkpoint: str
    """OFA checkpoint, or any other pipeline: a folder or a hub name"""
    teacher: str | None = None
    """pipeline of the original model: the first row, and what PSNR and SSIM compare with"""
    compare: tuple[str, ...] = ()
    """more OFA checkpoints or pipelines as NAME=DIR, each a group of rows with this name"""
    sizes: tuple[float, ...] | None = None
    """sizes of the checkpoint; all by default"""
    variants: tuple[str, ...] = ()
    """more rows, each of calls of the supernet itself: NAME:ARGUMENT=VALUE,… as in fast:size=fast for a kept schedule,
    or guided:guidance_size=0.4,guidance_scale=3"""
    metrics: Annotated[tuple[str, ...] | None, one_of(METRICS)] = None
    """macs, latency, memory, fid, kid, mind, precision, recall, clip_score, psnr, ssim, answer_error; all that can be
    had from what is given, by default"""


@Parameter(name="*", group=Group.create_ordered("reference"))
@dataclass(frozen=True, kw_only=True)
class ReferenceImages(Bundle):
    """Real images to compare with, and what looks at images."""

    reference_dir: str | None = None
    """folder of real images, for FID, KID, MIND, precision and recall"""
    reference_dataset_name: str | None = None
    """the same of a `datasets` data set: a hub name, or a folder of save_to_disk"""
    reference_dataset_split: str = "validation"
    """split of that data set"""
    reference_image_column: str = "image"
    """its column of images"""
    reference_statistics: str | None = None
    """instead of images, for FID alone: .safetensors, or .npz with mu and sigma"""
    save_reference_statistics: str | None = None
    """file to write the statistics of the images to, as .safetensors"""
    extractor: str = "inception"
    """features for those: this, dinov2 (FD-DINOv2), or another name of torch-fidelity's"""
    prc_neighborhood: Annotated[int, COUNT] = NEIGHBORHOOD
    """precision and recall: k, which of its neighbours an image's ball reaches to"""
    clip_model: str = DEFAULT_CLIP
    """CLIP for the CLIP score: a folder or a hub repository"""


@Parameter(name="*", group=Group.create_ordered("sampling"))
@dataclass(frozen=True, kw_only=True)
class Samples(Bundle):
    """How images are sampled."""

    num_samples: Annotated[int, COUNT] = 1000
    """images per size"""
    num_inference_steps: Annotated[int, COUNT] = 50
    """denoising steps per image"""
    prompts_file: str | None = None
    """text-to-image: one prompt a line, or a metadata.jsonl (text); used in turn"""
    calls_file: str | None = None
    """for pipelines of any class: calls of the pipeline, used in turn, as `ofadiff record` takes them (.txt, .jsonl,
    .csv); one image or video each"""
    recordings_dir: str | None = None
    """recordings of the original's denoiser: MACs, latency and memory are those of a recorded call, and answers are
    compared"""
    guidance_scale: float | None = None
    """text-to-image: the pipeline's own by default"""
    resolution: Annotated[int | None, COUNT] = None
    """text-to-image: height and width, pixels; the pipeline's own by default"""
    scheduler: Annotated[str | None, one_of(SCHEDULERS)] = None
    """ddim, ddpm or dpmsolver; the checkpoint's own by default; the teacher gets the same"""
    batch_size: Annotated[int, COUNT] = 64
    """images per process and call; changes them by rounding only"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the first image; the next one has the next seed"""
    fid_seeds: Annotated[int, COUNT] = 1
    """sets of so many images for FID, each from seeds of its own: with several, the mean ± standard deviation"""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """of the models: float32, float16 or bfloat16"""
    cost_batch_size: Annotated[int, COUNT] = 1
    """images in the forward that is timed and whose memory is taken"""


@Parameter(name="*", group=Group.create_ordered("report"))
@dataclass(frozen=True, kw_only=True)
class ReportFiles(Bundle):
    """The report and where it goes."""

    output_dir: str
    """for report and samples: new, empty, or with samples to go on from"""
    overwrite_output_dir: bool = False
    """start over: replace the report and the samples in it"""
    num_shown: Annotated[int, COUNT] = 10
    """images per size in the report"""
    title: str = "One model, every size"
    """of the report"""


def evaluate_checkpoint(
    *,
    measured: Measured,
    files: ReportFiles,
    reference: ReferenceImages = ReferenceImages(),
    samples: Samples = Samples(),
) -> Report:
    """Measure every size of an OFA checkpoint and write one report.

    On several processes: `accelerate launch -m ofadiff evaluate …`. It makes `report.html` (one file that needs nothing
    else), `report.md`, `report.json`, `samples.png` and `quality_vs_size.png`, and keeps the images it measured in
    `samples`; run again after a kill, it goes on from those. A plain diffusers pipeline folder, such as an extracted
    size, can be measured too. A text-to-image model needs `--prompts_file`, and gets a CLIP score.

    Raises:
        ImportError: If torch-fidelity, scikit-image, transformers or matplotlib is needed and not installed.
        ValueError: If something that was asked for cannot work; before images are sampled.
    """
    check_output_dir(files)
    checkpoint = pipeline_folder(measured.checkpoint)
    teacher_folder = None if measured.teacher is None else pipeline_folder(measured.teacher)
    folders = compared(measured.compare)
    variants = variants_of(measured.variants)
    check(measured, checkpoint, reference, samples, files)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    if measured.metrics is None and reference.reference_statistics is not None:
        accelerator.print("No KID: it takes reference images, and there are only their statistics")
    on = DTYPES[samples.dtype], accelerator.device
    pipeline = load_pipeline(checkpoint, *on)
    teacher = None if teacher_folder is None else load_pipeline(teacher_folder, *on)
    compare = {name: load_pipeline(folder, *on) for name, folder in folders.items()}
    if samples.scheduler is not None:
        pipeline.scheduler = SCHEDULERS[samples.scheduler].from_config(pipeline.scheduler.config)
    for other in (teacher, *compare.values()):
        if other is not None:
            # Images are compared seed by seed: all have to be sampled in the same way.
            other.scheduler = pipeline.scheduler
    report = evaluate(
        pipeline,
        reference=images_of(reference),
        teacher=teacher,
        compare=compare,
        sizes=measured.sizes,
        metrics=measured.metrics,
        accelerator=accelerator,
        settings=evaluation_settings(reference, samples, files, command_line(measured, reference, samples, files)),
        variants=variants,
    )
    if accelerator.is_main_process:
        report.write(files.output_dir)
        print(f"\n{report.table()}\n\n{Path(files.output_dir) / 'report.html'} shows it all.")
    accelerator.end_training()
    return report


def evaluation_settings(
    reference: ReferenceImages, samples: Samples, files: ReportFiles, command: str
) -> EvaluationSettings:
    """What `evaluate` is told."""
    call = {"guidance_scale": samples.guidance_scale, "height": samples.resolution, "width": samples.resolution}
    return EvaluationSettings(
        num_samples=samples.num_samples,
        batch_size=samples.batch_size,
        seed=samples.seed,
        num_inference_steps=samples.num_inference_steps,
        arguments=None if samples.prompts_file is None else {"prompt": read_prompts(samples.prompts_file)},
        calls=None if samples.calls_file is None else read_located_calls(samples.calls_file),
        recordings=None if samples.recordings_dir is None else Recordings(samples.recordings_dir),
        call_arguments={name: value for name, value in call.items() if value is not None},
        extractor=reference.extractor,
        prc_neighborhood=reference.prc_neighborhood,
        fid_seeds=samples.fid_seeds,
        clip_model=reference.clip_model,
        cost_batch_size=samples.cost_batch_size,
        num_shown=files.num_shown,
        samples_dir=Path(files.output_dir) / SAMPLES,
        overwrite_samples=files.overwrite_output_dir,
        save_reference_statistics=reference.save_reference_statistics,
        title=files.title,
        command=command,
    )


def images_of(reference: ReferenceImages) -> str | Images | None:
    """Real images, or a file of their statistics."""
    if reference.reference_dataset_name is None:
        return reference.reference_dir or reference.reference_statistics
    split = load_dataset_split(reference.reference_dataset_name, split=reference.reference_dataset_split)
    return dataset_images(split, reference.reference_image_column)


def compared(given: Sequence[str]) -> dict[str, str]:
    """Folders of other pipelines, by the name that they have in the report."""
    folders: dict[str, str] = {}
    for each in given:
        name, _, folder = each.partition("=")
        if not name or not folder or name in folders:
            raise ValueError(f"--compare {each} is not NAME=FOLDER, with a name of its own")
        folders[name] = pipeline_folder(folder)
    return folders


def variants_of(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the calls of more rows take, by the names of these rows."""
    variants: dict[str, dict[str, Any]] = {}
    for each in given:
        name, _, words = each.partition(":")
        pairs = [word.partition("=") for word in words.split(",")]
        if not name or name in variants or not all(argument and value for argument, _, value in pairs):
            raise ValueError(f"--variants {each} is not NAME:ARGUMENT=VALUE,…, with a name of its own")
        variants[name] = {argument.strip(): parsed_value(value) for argument, _, value in pairs}
    return variants


def check(
    measured: Measured, checkpoint: str, reference: ReferenceImages, samples: Samples, files: ReportFiles
) -> None:
    """Raises ValueError, before any model is loaded, if something the user gave cannot work."""
    if measured.sizes is not None:
        subnets = SizeTable.from_dict(read_ofa_config(Path(checkpoint) / find_denoisers(checkpoint)[0]))
        for size in measured.sizes:
            subnets.find(size)
    missing = check_reference(reference, files)
    if measured.teacher is None:
        missing["teacher"] = "there is no teacher; give --teacher"
    if samples.calls_file is not None:
        if samples.prompts_file is not None:
            raise ValueError("--prompts_file and --calls_file exclude each other")
        read_located_calls(samples.calls_file)
    elif samples.prompts_file is None:
        missing["prompts"] = "there are no prompts; give --prompts_file"
    else:
        read_prompts(samples.prompts_file)
    if samples.recordings_dir is None:
        missing["recordings"] = "there are no recordings; give --recordings_dir"
    else:
        read_description(Path(samples.recordings_dir))
    names = choose_metrics(measured.metrics, missing)
    check_fid_seeds(samples.fid_seeds, names)
    if any("reference" in METRICS[name].needs for name in names):
        extractor = find_extractor(reference.extractor)
        statistics = read_statistics(reference.reference_statistics)
        if statistics is not None:
            statistics.check_extractor(extractor)
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("the report needs Jinja: pip install ofadiff[eval]")
    if any(column.plotted for name in names for column in METRICS[name].columns.values()) and (
        importlib.util.find_spec("matplotlib") is None
    ):
        raise ImportError("plots need matplotlib: pip install ofadiff[eval]")


def check_output_dir(files: ReportFiles) -> None:
    """Raises ValueError unless the output folder is new, empty, an earlier evaluation's, or may be overwritten."""
    folder = Path(files.output_dir)
    check_folder("--output_dir", folder)
    known = files.overwrite_output_dir or not folder.exists() or is_begun(folder)
    if not known and any(not path.is_dir() for path in folder.rglob("*")):
        raise ValueError(
            f"--output_dir {folder} is not empty; choose another one, or replace the report in it with "
            "--overwrite_output_dir"
        )


def is_begun(folder: Path) -> bool:
    """Whether there is an evaluation in the folder to go on from, be it that it was killed while it began."""
    return any((folder / SAMPLES).rglob(f"{PROTOCOL_NAME}*"))


def check_reference(reference: ReferenceImages, files: ReportFiles) -> dict[str, str]:
    """Raises ValueError unless there is at most one reference that can be read; says what metrics lack in it."""
    given = [reference.reference_dir, reference.reference_dataset_name, reference.reference_statistics]
    if sum(value is not None for value in given) > 1:
        raise ValueError("--reference_dir, --reference_dataset_name and --reference_statistics exclude each other")
    if reference.reference_dir is not None:
        image_folder(reference.reference_dir)
    images_of(reference)
    statistics = reference.reference_statistics
    if statistics is not None and not Path(statistics).is_file():
        raise ValueError(f"--reference_statistics {statistics} is not a file")
    target = reference.save_reference_statistics
    if target is not None:
        if Path(target).suffix != ".safetensors":
            raise ValueError(f"--save_reference_statistics {target} does not end in .safetensors")
        # They are written before images are sampled: a killed evaluation that goes on has left them.
        if Path(target).exists() and not (files.overwrite_output_dir or is_begun(Path(files.output_dir))):
            raise ValueError(f"--save_reference_statistics {target} exists; replace it with --overwrite_output_dir")
    missing = missing_reference(any(given), read_statistics(statistics))
    return {need: f"{reason}; give --reference_dir" for need, reason in missing.items()}


def command_line(*bundles: Bundle) -> str:
    """The command as the report states it: what differs from the defaults; of absolute paths the last part."""
    words = ["ofadiff", "evaluate"]
    for bundle in bundles:
        for each in fields(bundle):  # type: ignore[arg-type]
            value = getattr(bundle, each.name)
            if value != each.default:
                values = value if isinstance(value, tuple) else () if value is True else (value,)
                words += [f"--{each.name}", *(_without_folders(str(one)) for one in values)]
    return shlex.join(words)


def _without_folders(word: str) -> str:
    name, equals, path = word.partition("=") if not word.startswith("/") else ("", "", word)
    return name + equals + Path(path).name if Path(path).is_absolute() else word

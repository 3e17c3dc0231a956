"""Measures every size of an OFA checkpoint and writes one report.

    accelerate launch recipes/evaluate.py --checkpoint OFA_DIR --teacher DIR --reference_dir IMAGES --output_dir OUT

makes `OUT/report.html` (one file that needs nothing else), `report.md`, `report.json`, `samples.png` and
`quality_vs_size.png`, and keeps the images it measured in `OUT/samples`. Run again after a kill, it goes on from those.
A plain diffusers pipeline folder, such as an extracted size, can be measured too. A text-to-image model needs
`--prompts_file FILE`, and gets a CLIP score.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
)

from ofadiff import OFAPipeline
from ofadiff.commands.processes import who_fails
from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.images import Images, image_folder
from ofadiff.evaluation import METRICS, Report, evaluate, read_prompts
from ofadiff.evaluation.evaluator import missing_reference, read_statistics
from ofadiff.evaluation.finite import NotFiniteError
from ofadiff.evaluation.metrics.clip_scorer import DEFAULT_CLIP
from ofadiff.evaluation.metrics.extractors import find_extractor
from ofadiff.evaluation.metrics.table import choose_metrics
from ofadiff.evaluation.saved_images import PROTOCOL_NAME
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.pipelines.class_conditional import class_count
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.pipeline_folder import find_denoiser, local_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}


SAMPLES = "samples"
# Processes wait for the main one while it times models and computes distances.
TIMEOUT = datetime.timedelta(hours=6)


def evaluate_checkpoint(args: argparse.Namespace, command: str | None = None) -> Report:
    """Writes the report and returns it.

    Raises:
        ImportError: If torch-fidelity, scikit-image, transformers or matplotlib is needed and not installed.
        ValueError: If something that was asked for cannot work; before images are sampled.
    """
    check(args)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    if args.metrics is None and args.reference_statistics is not None:
        accelerator.print("No KID: it takes reference images, and there are only their statistics")
    pipeline = load_pipeline(args.checkpoint, args, accelerator.device)
    teacher = None if args.teacher is None else load_pipeline(args.teacher, args, accelerator.device)
    compare = {name: load_pipeline(folder, args, accelerator.device) for name, folder in compared(args).items()}
    if args.scheduler is not None:
        pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
    for other in (teacher, *compare.values()):
        if other is not None:
            # Images are compared seed by seed: all have to be sampled in the same way.
            other.scheduler = pipeline.scheduler
    report = evaluate(
        pipeline,
        reference=reference(args),
        teacher=teacher,
        compare=compare,
        sizes=args.sizes,
        metrics=args.metrics,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        arguments=None if args.prompts_file is None else {"prompt": read_prompts(args.prompts_file)},
        call_arguments=call_arguments(args),
        extractor=args.extractor,
        clip_model=args.clip_model,
        cost_batch_size=args.cost_batch_size,
        num_shown=args.num_shown,
        samples_dir=Path(args.output_dir) / SAMPLES,
        overwrite_samples=args.overwrite_output_dir,
        save_reference_statistics=args.save_reference_statistics,
        title=args.title,
        command=command,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        report.write(args.output_dir)
    accelerator.end_training()
    return report


def call_arguments(args: argparse.Namespace) -> dict[str, float]:
    """What every call of the pipeline gets beyond its own defaults."""
    wanted = {"guidance_scale": args.guidance_scale, "height": args.resolution, "width": args.resolution}
    return {name: value for name, value in wanted.items() if value is not None}


def reference(args: argparse.Namespace) -> str | Images | None:
    """Real images, or a file of their statistics."""
    if args.reference_dataset_name is None:
        return args.reference_dir or args.reference_statistics
    split = load_dataset_split(args.reference_dataset_name, split=args.reference_dataset_split)
    return dataset_images(split, args.reference_image_column)


def compared(args: argparse.Namespace) -> dict[str, str]:
    """Folders of other pipelines, by the name that they have in the report."""
    folders = {}
    for given in args.compare:
        name, _, folder = given.partition("=")
        if not name or not folder or name in folders:
            raise ValueError(f"--compare {given} is not NAME=FOLDER, with a name of its own")
        folders[name] = pipeline_folder(folder)
    return folders


def pipeline_folder(name: str) -> str:
    """The folder of a pipeline; a hub name is downloaded. Raises ValueError if it is neither."""
    try:
        folder = local_folder(name, {})
    except (OSError, ValueError):
        folder = Path(name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} holds no model_index.json, so it is no pipeline folder, and the hub gave none")
    return str(folder)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before any model is loaded, if something the user gave cannot work."""
    check_output_dir(args)
    args.checkpoint = pipeline_folder(args.checkpoint)
    args.teacher = None if args.teacher is None else pipeline_folder(args.teacher)
    compared(args)
    if args.sizes is not None:
        subnets = SizeTable.from_dict(read_ofa_config(Path(args.checkpoint) / find_denoiser(args.checkpoint)))
        for size in args.sizes:
            subnets.find(size)
    missing = check_reference(args)
    if args.teacher is None:
        missing["teacher"] = "there is no teacher; give --teacher"
    if args.prompts_file is None:
        missing["prompts"] = "there are no prompts; give --prompts_file"
    else:
        read_prompts(args.prompts_file)
    names = choose_metrics(args.metrics, missing)
    if any("reference" in METRICS[name].needs for name in names):
        extractor = find_extractor(args.extractor)
        statistics = read_statistics(args.reference_statistics)
        if statistics is not None:
            statistics.check_extractor(extractor)
    if any(column.plotted for name in names for column in METRICS[name].columns.values()) and (
        importlib.util.find_spec("matplotlib") is None
    ):
        raise ImportError("plots need matplotlib: pip install ofadiff[eval]")


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises ValueError unless the output folder is new, empty, an earlier evaluation's, or may be overwritten."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    known = args.overwrite_output_dir or not folder.exists() or is_begun(folder)
    if not known and any(folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} is not empty; choose another one, or replace the report in it with "
            "--overwrite_output_dir"
        )


def is_begun(folder: Path) -> bool:
    """Whether there are samples of an evaluation in the folder to go on from."""
    return any((folder / SAMPLES).rglob(PROTOCOL_NAME))


def check_reference(args: argparse.Namespace) -> dict[str, str]:
    """Raises ValueError unless there is at most one reference that can be read; says what metrics lack in it."""
    given = [args.reference_dir, args.reference_dataset_name, args.reference_statistics]
    if sum(value is not None for value in given) > 1:
        raise ValueError("--reference_dir, --reference_dataset_name and --reference_statistics exclude each other")
    if args.reference_dir is not None:
        image_folder(args.reference_dir)
    reference(args)
    if args.reference_statistics is not None and not Path(args.reference_statistics).is_file():
        raise ValueError(f"--reference_statistics {args.reference_statistics} is not a file")
    target = args.save_reference_statistics
    if target is not None:
        if Path(target).suffix != ".safetensors":
            raise ValueError(f"--save_reference_statistics {target} does not end in .safetensors")
        # They are written before images are sampled: a killed evaluation that goes on has left them.
        if Path(target).exists() and not (args.overwrite_output_dir or is_begun(Path(args.output_dir))):
            raise ValueError(f"--save_reference_statistics {target} exists; replace it with --overwrite_output_dir")
    missing = missing_reference(any(given), read_statistics(args.reference_statistics))
    return {need: f"{reason}; give --reference_dir" for need, reason in missing.items()}


def load_pipeline(folder: str, args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """An OFA checkpoint with all its sizes, or a plain pipeline, on a device."""
    if any(Path(folder).glob(f"*/{CONFIG_NAME}")):
        pipeline = OFAPipeline.from_pretrained(folder)
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        if type(pipeline) is DDPMPipeline and class_count(pipeline.unet) is not None:
            pipeline = ClassConditionalDDPMPipeline(**pipeline.components)
    if pipeline.components.get("safety_checker") is not None:
        # An image that it flags comes out black, and would count in every metric.
        pipeline.register_modules(safety_checker=None)
    return pipeline.to(device, DTYPES[args.dtype])


def count(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure every size of an OFA checkpoint and write one report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("what to measure").add_argument
    add("--checkpoint", required=True, help="OFA checkpoint, or any other pipeline: a folder or a hub name")
    add("--teacher", help="pipeline of the original model: the first row, and what PSNR and SSIM compare with")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="more OFA checkpoints or pipelines, each a group of rows with this name",
    )
    add("--sizes", nargs="+", type=float, help="sizes of the checkpoint; all by default")
    add("--metrics", nargs="+", choices=METRICS, help="all that can be had from what is given, by default")
    add("--reference_dir", help="folder of real images, for FID and KID")
    add("--reference_dataset_name", help="the same of a `datasets` data set: a hub name, or a folder of save_to_disk")
    add("--reference_dataset_split", default="validation", help="split of that data set")
    add("--reference_image_column", default="image", help="its column of images")
    add("--reference_statistics", help="instead of images, for FID alone: .safetensors, or .npz with mu and sigma")
    add("--save_reference_statistics", metavar="FILE", help="write the statistics of the images, as .safetensors")
    add("--extractor", default="inception", help="features for FID and KID: this, or another name of torch-fidelity's")
    add("--clip_model", default=DEFAULT_CLIP, help="CLIP for the CLIP score: a folder or a hub repository")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=count, default=1000, help="images per size")
    add("--num_inference_steps", type=count, default=50, help="denoising steps per image")
    add("--prompts_file", help="text-to-image: one prompt a line, or a metadata.jsonl (text); used in turn")
    add("--guidance_scale", type=float, help="text-to-image: the pipeline's own by default")
    add("--resolution", type=count, help="text-to-image: height and width, pixels; the pipeline's own by default")
    add("--scheduler", choices=SCHEDULERS, help="the checkpoint's own by default; the teacher gets the same")
    add("--batch_size", type=count, default=64, help="images per process and call; changes them by rounding only")
    add("--seed", type=int, default=0, help="seed of the first image; the next one has the next seed")
    add("--dtype", choices=DTYPES, default="float32", help="of the models")
    add(
        "--cost_batch_size", type=count, default=1, help="images in the forward that is timed and whose memory is taken"
    )

    add = parser.add_argument_group("report").add_argument
    add("--output_dir", required=True, help="for report and samples: new, empty, or with samples to go on from")
    add("--overwrite_output_dir", action="store_true", help="start over: replace the report and the samples in it")
    add("--num_shown", type=count, default=10, help="images per size in the report")
    add("--title", default="One model, every size", help="of the report")
    return parser


def command_line(arguments: Sequence[str]) -> str:
    """The command as the report states it; of absolute paths the last part."""
    words = []
    for word in arguments:
        name, equals, path = word.partition("=") if not word.startswith("/") else ("", "", word)
        words.append(name + equals + Path(path).name if Path(path).is_absolute() else word)
    return shlex.join(["python", "recipes/evaluate.py", *words])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    try:
        report = evaluate_checkpoint(args, command_line(arguments))
    except (ImportError, OSError, ValueError, NotFiniteError) as error:
        parser.exit(2, f"{parser.prog}: error: {who_fails()}{error}\n")
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{report.table()}\n\n{Path(args.output_dir) / 'report.html'} shows it all.")


if __name__ == "__main__":
    main()

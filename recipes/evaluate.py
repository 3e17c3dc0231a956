"""Measures every size of an OFA checkpoint and writes one report.

    python recipes/evaluate.py --checkpoint OFA_DIR --teacher DIR --reference_dir IMAGES --output_dir OUT

makes `OUT/report.html` (one file that needs nothing else), `report.md`, `report.json`, `samples.png` and
`quality_vs_size.png`. A plain diffusers pipeline folder, such as an extracted size, can be measured too. A
text-to-image model needs `--prompts_file FILE`, and gets a CLIP score.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
)

from ofadiff import OFAPipeline
from ofadiff.evaluation import METRICS, Report, evaluate, read_prompts
from ofadiff.evaluation.clip_score import DEFAULT_CLIP
from ofadiff.evaluation.extractors import find_extractor
from ofadiff.evaluation.metrics import choose_metrics
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.pipelines.ofa_pipeline import find_denoiser
from ofadiff.sizes import SizeTable
from ofadiff.supernet import CONFIG_NAME, read_ofa_config
from ofadiff.training.data import image_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}


def evaluate_checkpoint(args: argparse.Namespace, command: str | None = None) -> Report:
    """Writes the report and returns it.

    Raises:
        ImportError: If torch-fidelity, scikit-image or transformers is needed and not installed.
        ValueError: If something that was asked for cannot work; before any image is sampled.
    """
    check(args)
    pipeline = load_pipeline(args.checkpoint, args)
    teacher = None if args.teacher is None else load_pipeline(args.teacher, args)
    if args.scheduler is not None:
        pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
    if teacher is not None:
        # Images are compared seed by seed: both have to be sampled in the same way.
        teacher.scheduler = pipeline.scheduler
    report = evaluate(
        pipeline,
        reference=args.reference_dir,
        teacher=teacher,
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
        title=args.title,
        command=command,
    )
    report.write(args.output_dir)
    return report


def call_arguments(args: argparse.Namespace) -> dict[str, float]:
    """What every call of the pipeline gets beyond its own defaults."""
    wanted = {"guidance_scale": args.guidance_scale, "height": args.resolution, "width": args.resolution}
    return {name: value for name, value in wanted.items() if value is not None}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before any model is loaded, if something the user gave cannot work."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {output_dir} is not empty; choose another one, or replace the report in it with "
            "--overwrite_output_dir"
        )
    for folder in filter(None, (args.checkpoint, args.teacher)):
        if not (Path(folder) / "model_index.json").is_file():
            raise ValueError(f"{folder} holds no model_index.json, so it is no diffusers pipeline folder")
    if args.sizes is not None:
        subnets = SizeTable.from_dict(read_ofa_config(Path(args.checkpoint) / find_denoiser(args.checkpoint)))
        for size in args.sizes:
            subnets.find(size)
    missing = {}
    if args.reference_dir is None:
        missing["reference"] = "there are no reference images; give --reference_dir"
    else:
        image_folder(args.reference_dir)
    if args.teacher is None:
        missing["teacher"] = "there is no teacher; give --teacher"
    if args.prompts_file is None:
        missing["prompts"] = "there are no prompts; give --prompts_file"
    else:
        read_prompts(args.prompts_file)
    if any("reference" in METRICS[name].needs for name in choose_metrics(args.metrics, missing)):
        find_extractor(args.extractor)


def load_pipeline(folder: str, args: argparse.Namespace) -> DiffusionPipeline:
    """An OFA checkpoint with all its sizes, or a plain pipeline, on the device asked for."""
    if any(Path(folder).glob(f"*/{CONFIG_NAME}")):
        pipeline = OFAPipeline.from_pretrained(folder)
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        if type(pipeline) is DDPMPipeline and pipeline.unet.config.num_class_embeds is not None:
            pipeline = ClassConditionalDDPMPipeline(**pipeline.components)
    if pipeline.components.get("safety_checker") is not None:
        # An image that it flags comes out black, and would count in every metric.
        pipeline.register_modules(safety_checker=None)
    return pipeline.to(args.device, DTYPES[args.dtype])


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
    add("--checkpoint", required=True, help="OFA checkpoint, or any other diffusers pipeline folder")
    add("--teacher", help="pipeline folder of the original model: the first row, and what PSNR and SSIM compare with")
    add("--sizes", nargs="+", type=float, help="sizes of the checkpoint; all by default")
    add("--metrics", nargs="+", choices=METRICS, help="all that can be had from what is given, by default")
    add("--reference_dir", help="folder of real images, for FID and KID")
    add("--extractor", default="inception", help="features for FID and KID: this, or another name of torch-fidelity's")
    add("--clip_model", default=DEFAULT_CLIP, help="CLIP for the CLIP score: a folder or a hub repository")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=count, default=1000, help="images per size")
    add("--num_inference_steps", type=count, default=50, help="denoising steps per image")
    add("--prompts_file", help="text-to-image: one prompt a line, or a metadata.jsonl (text); used in turn")
    add("--guidance_scale", type=float, help="text-to-image: the pipeline's own by default")
    add("--resolution", type=count, help="text-to-image: height and width, pixels; the pipeline's own by default")
    add("--scheduler", choices=SCHEDULERS, help="the checkpoint's own by default; the teacher gets the same")
    add("--batch_size", type=count, default=64, help="images sampled at a time; changes no image")
    add("--seed", type=int, default=0, help="seed of the first image; the next one has the next seed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where everything runs")
    add("--dtype", choices=DTYPES, default="float32", help="of the models")
    add(
        "--cost_batch_size", type=count, default=1, help="images in the forward that is timed and whose memory is taken"
    )

    add = parser.add_argument_group("report").add_argument
    add("--output_dir", required=True, help="where the report is written; must be new or empty")
    add("--overwrite_output_dir", action="store_true", help="replace a report in the output folder")
    add("--num_shown", type=count, default=10, help="images per size in the report")
    add("--title", default="One model, every size", help="of the report")
    return parser


def command_line(arguments: Sequence[str]) -> str:
    """The command as the report states it; of absolute paths the last part."""
    return shlex.join(
        ["python", "recipes/evaluate.py", *(Path(a).name if Path(a).is_absolute() else a for a in arguments)]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    try:
        report = evaluate_checkpoint(args, command_line(arguments))
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"\n{report.table()}\n\n{Path(args.output_dir) / 'report.html'} shows it all.")


if __name__ == "__main__":
    main()

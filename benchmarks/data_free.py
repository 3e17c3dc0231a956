"""Compression without data: recordings of the teacher's own calls in place of images, at equal steps.

    python benchmarks/data_free.py --output_dir data_free

trains the demo's digits model until its held-out loss stops falling, compresses it twice with the same budget of steps,
on images and on recordings of the model's own calls, and prints what every size of both is worth on real digits that no
training saw.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from ofadiff import OFAPipeline, evaluate, runs
from ofadiff.commands.command import main, script
from ofadiff.commands.compress import make_supernet
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import image_folder
from ofadiff.data.order import fixed_batches, hold_out
from ofadiff.denoisers import prepare_pixels
from ofadiff.evaluation import register_extractor
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.training.losses import denoising_loss
from ofadiff.values import COUNT, WHOLE, Bundle

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import demo

SIZES = (0.35, 0.45, 0.6, 0.8, 1.0)
LABELS = 16


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Study(Bundle):
    """How large the comparison is."""

    output_dir: str = "data_free"
    """folder to make; a teacher in it is used again"""
    teacher_steps: Annotated[int, COUNT] = 3500
    """training steps of the original model"""
    joint_steps: Annotated[int, COUNT] = 800
    """training steps of each joint run"""
    calls: Annotated[int, COUNT] = 88
    """calls that are recorded, of 16 images each"""
    steps_per_call: Annotated[int, COUNT] = 8
    """steps kept of each"""
    inference_steps: Annotated[int, COUNT] = 50
    """denoising steps of each call"""
    num_samples: Annotated[int, COUNT] = 1000
    """images sampled at every size for FID"""
    seed: Annotated[int, WHOLE] = 0
    """of everything random"""


def compare(*, study: Study = Study()) -> dict[str, dict[str, float]]:
    """Compress the same teacher on images and on recordings, and measure both on real held-out images."""
    folder = Path(study.output_dir)
    if not (folder / "digits").exists():
        demo.write_digits(folder / "digits")
    images = image_folder(folder / "digits")
    seen, held_out = hold_out(len(images.names), demo.VALIDATION_FRACTION, study.seed)
    train_data, unseen = (ImageData(images, demo.RESOLUTION, 1, indices=part) for part in (seen, held_out))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if not (folder / "teacher").exists():
        torch.manual_seed(study.seed)
        teacher = demo.make_unet()
        steps = demo.Demo(teacher_steps=study.teacher_steps, seed=study.seed)
        demo.train_teacher(teacher, demo.DENOISERS["unet"], train_data, scheduler, steps)
        DDPMPipeline(teacher, scheduler).save_pretrained(folder / "teacher")
    torch.manual_seed(study.seed)
    register_extractor(demo.EXTRACTOR, demo.train_classifier(train_data, study.seed))
    write_calls(folder / "calls.jsonl", study)

    run_all(folder, study)
    batches = list(fixed_batches(unseen, 2048, 128, study.seed, "benchmark"))
    loss = functools.partial(held_out_loss, batches=batches, scheduler=scheduler)
    original = UNet2DModel.from_pretrained(folder / "teacher" / "unet").eval()
    results = {"teacher": {"loss": loss(original)}}
    # As it was saved: a configuration that was not leaves out what were defaults, and another class has others.
    saved = DDPMScheduler.from_pretrained(folder / "teacher" / "scheduler")
    teacher = ClassConditionalDDPMPipeline(original, DPMSolverMultistepScheduler.from_config(saved.config))
    for name in ("images", "recordings", "images cut", "recordings cut"):
        pipeline = OFAPipeline.from_pretrained(folder / name.replace(" ", "-"))
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(saved.config)
        options = {"num_inference_steps": demo.INFERENCE_STEPS, "extractor": demo.EXTRACTOR, "metrics": ["fid", "psnr"]}
        options |= {"num_samples": study.num_samples, "batch_size": 100, "seed": study.seed, "progress": False}
        report = evaluate(pipeline, reference=demo.as_uint8(unseen), teacher=teacher, **options)
        for row in report.rows:
            key = "teacher" if row.size is None else f"{name} {row.size:g}"
            results.setdefault(key, {}).update({k: v for k, v in row.values.items() if k in ("fid", "psnr")})
        for size in pipeline.sizes:
            with pipeline.supernet.at(size) as denoiser:
                results[f"{name} {size:g}"]["loss"] = loss(denoiser)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return results


def write_calls(file: Path, study: Study) -> None:
    """Sixteen images a call, of all classes alike."""
    lines = []
    for call in range(study.calls):
        labels = [(call * LABELS + image) % demo.CLASSES for image in range(LABELS)]
        lines.append(json.dumps({"class_labels": labels, "num_inference_steps": study.inference_steps}))
    file.write_text("\n".join(lines) + "\n")


def run_all(folder: Path, study: Study) -> None:
    """Both joint runs, and what both cut before any training."""
    model = runs.Model(pretrained_model_name_or_path=str(folder / "teacher"))
    for name in ("images", "recordings"):
        for steps, out in ((0, folder / f"{name}-cut"), (study.joint_steps, folder / name)):
            if (out / "unet").exists():
                continue
            optimization = runs.Optimization(
                max_train_steps=steps,
                # As many images a step on both sides: a recorded call has sixteen.
                train_batch_size=demo.BATCH_SIZE if name == "images" else demo.BATCH_SIZE // LABELS,
                # As the published numbers were made; the library's defaults have changed since.
                optimizer="adamw",
                learning_rate=5e-4,
                ema_decay=0.995,
                seed=study.seed,
            )
            ranked = 1024 if name == "images" else 1024 // LABELS
            compression = runs.Compression(sizes=SIZES, importance_samples=ranked, correction_samples=0)
            # Recordings draw none by themselves.
            drawn = 0 if name == "images" else None
            watching = runs.Watching(validation_samples=64, checkpointing_steps=10**6, num_validation_images=drawn)
            bundles = {"compression": compression, "optimization": optimization, "watching": watching}
            output = runs.Output(output_dir=str(out), overwrite_output_dir=True)
            if name == "images":
                data = runs.Data(train_data_dir=str(folder / "digits"), validation_fraction=demo.VALIDATION_FRACTION)
                losses = runs.Losses(distill_weight=1.0)
                run = runs.start(runs.RunSettings(model, data, output, losses=losses, **bundles))
            else:
                recorded = {"recordings_dir": str(folder / "recorded-calls"), "steps_per_call": study.steps_per_call}
                calls = runs.Calls(calls_file=str(folder / "calls.jsonl"), **recorded)
                run = runs.start_recorded(runs.RunSettings(model, runs.Data(), output, calls=calls, **bundles))
            supernet = make_supernet(run)
            runs.save(run, supernet, runs.train_jointly(run, supernet))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, batches: list, scheduler: DDPMScheduler) -> float:
    """Mean denoising loss on real images that no training saw."""
    prepare = functools.partial(prepare_pixels, noise_scheduler=scheduler)
    return float(torch.cat([denoising_loss(model, batch, prepare) for batch in batches]).mean())


def table(results: dict[str, dict[str, float]]) -> str:
    """The results, the excess of the loss over the teacher's in 1e-4."""
    base = results["teacher"]["loss"]
    rows = ["| | held-out loss | excess, 1e-4 | FID | PSNR to the teacher |", "|---|---|---|---|---|"]
    for name, values in results.items():
        psnr = f"{values['psnr']:.1f}" if values.get("psnr") is not None else ""
        excess = (values["loss"] - base) * 1e4
        rows.append(f"| {name} | {values['loss']:.4f} | {excess:.0f} | {values['fid']:.2f} | {psnr} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(script(compare, __file__))

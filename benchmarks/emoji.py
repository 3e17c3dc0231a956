"""Text-to-image compression on real pictures, offline: colour emoji and their Unicode names.

    python benchmarks/emoji.py --output_dir emoji            # an hour on one CPU core
    python benchmarks/emoji.py --output_dir emoji --setting gpu

trains a small Stable Diffusion from scratch (byte-pair tokenizer, CLIP, VAE, UNet), compresses its UNet with
`recipes/compress_sd.py`, and measures FID and CLIP score of every size beside the original and beside the same subnets
without joint training. With `--recordings` it is compressed once more with `recipes/compress_any.py`, on recordings of
the pipeline's own calls in place of pictures, with as many steps, and `held_out.json` gets the losses of all on the
pictures that no training saw. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from diffusers import AutoencoderKL, StableDiffusionPipeline
from emoji_data import FONT, check_font, write_emoji
from emoji_models import ImageTower, Recipe, make_pipeline, make_tokenizer, save_clip, train_clip, train_unet, train_vae
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging

from ofadiff import OFAPipeline, Supernet, evaluate, runs
from ofadiff.data.order import fixed_batches, hold_out
from ofadiff.evaluation import Report, register_extractor
from ofadiff.training.losses import denoising_loss

EXTRACTOR = "emoji CLIP"
UNTRAINED, RECORDED = "not trained jointly", "on recordings"
RECIPES = Path(__file__).parents[1] / "recipes"
# Captions in one recorded call, and denoising steps kept of it; every caption is sampled twice.
CAPTIONS_PER_CALL, STEPS_PER_CALL, PASSES = 16, 8, 2


@dataclass(frozen=True)
class Setting:
    """How large everything is.

    Attributes:
        resolution: Side of the images, in pixels.
        clip: The CLIP that gives the pipeline its text encoder, and the evaluation its features.
        vae: The autoencoder.
        unet: The denoiser that is compressed.
        joint: Its joint training; channels are not used.
        sizes: What it is compressed to, fractions of the UNet's parameters.
        num_samples: Images sampled of each size; their prompts go through all captions.
        importance_samples: Noisy images that the ranking looks at.
        correction_samples: Noisy images that the readers are fitted to.
        validation_samples: Noisy images of a validation.
    """

    resolution: int
    clip: Recipe
    vae: Recipe
    unet: Recipe
    joint: Recipe
    sizes: tuple[float, ...]
    num_samples: int
    importance_samples: int = 1024
    correction_samples: int = 384
    validation_samples: int = 512


SETTINGS = {
    "cpu": Setting(
        resolution=32,
        clip=Recipe((96,), 600, 128, 2e-3),
        vae=Recipe((16, 32, 64), 1500, 32, 2e-3),
        unet=Recipe((64, 128), 3000, 32, 2e-3),
        joint=Recipe((), 1000, 32, 2e-3),
        sizes=(0.4, 0.6, 0.8, 1.0),
        num_samples=400,
    ),
    "gpu": Setting(
        resolution=64,
        clip=Recipe((256,), 2000, 512, 5e-4),
        vae=Recipe((64, 128, 128), 10_000, 64, 1e-3),
        unet=Recipe((256, 384, 512), 30_000, 256, 3e-4),
        joint=Recipe((), 20_000, 256, 8e-4),
        sizes=(0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
        num_samples=1405,
    ),
}
VALIDATION_FRACTION = 0.1
INFERENCE_STEPS = 20
GUIDANCE_SCALE = 3.0


def benchmark(args: argparse.Namespace) -> Report:
    """Makes everything in `args.output_dir` that is not there yet.

    Raises:
        ValueError: If the font is missing, or the folder holds something else.
    """
    folder, setting = Path(args.output_dir), SETTINGS[args.setting]
    check_font(args.font)
    claim(folder, {"setting": args.setting, "seed": args.seed, **json.loads(json.dumps(asdict(setting)))})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.set_verbosity_error()  # transformers tells that CLIP has more weights than its text tower
    started = time.perf_counter()

    print("1/4  Emoji and their names", flush=True)
    captions = write_emoji(folder / "emoji", args.font, setting.resolution)
    images = read_images(folder / "emoji", len(captions))

    print("2/4  A small Stable Diffusion, trained from scratch", flush=True)
    torch.manual_seed(args.seed)
    train_original(folder, images * 2 - 1, captions, setting, args.seed, device)

    print("3/4  Compression", flush=True)
    compress(folder, setting, args.seed, "untrained", steps=0)
    compress(folder, setting, args.seed, "ofa", steps=setting.joint.steps)
    if args.recordings:
        compress_recorded(folder, captions, setting, args.seed)

    print("4/4  Evaluation", flush=True)
    report = measure(folder, (images * 255).round().to(torch.uint8), captions, setting, args, device)
    print(
        f"\n{report.table()}\n\n{folder / 'report.html'} shows it all. {(time.perf_counter() - started) / 60:.0f} min"
    )
    return report


def claim(folder: Path, setting: dict[str, object]) -> None:
    """Raises ValueError if the folder holds anything but an earlier part of the same run."""
    path = folder / "setting.json"
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not empty; choose another one or remove it")
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != setting:
        raise ValueError(f"--output_dir {folder} holds a run of another setting or seed; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(setting, indent=2) + "\n", encoding="utf-8")


def read_images(folder: Path, count: int) -> torch.Tensor:
    """All pictures, `(N, 3, H, W)` in [0, 1]."""
    return torch.stack([pil_to_tensor(Image.open(folder / f"{index:04}.png")) for index in range(count)]) / 255


def train_original(
    folder: Path, images: torch.Tensor, captions: list[str], setting: Setting, seed: int, device: str
) -> None:
    """Makes `folder/clip`, `folder/vae` and `folder/original`, the pipeline, one after the other."""
    if not (folder / "clip").exists():
        tokenizer = make_tokenizer(folder / "tokenizer", captions)
        clip = train_clip(images, captions, tokenizer, setting.clip, device)
        with whole(folder / "clip") as unfinished:
            save_clip(clip, tokenizer, unfinished)
    if not (folder / "vae").exists():
        vae = train_vae(images, setting.vae, device)
        with whole(folder / "vae") as unfinished:
            vae.save_pretrained(unfinished)
    if not (folder / "original").exists():
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
        pipeline = make_pipeline(vae, folder / "clip", tokenizer, setting.unet, setting.resolution)
        # What compress_sd.py holds out for validation, the original does not see either.
        seen, _ = hold_out(len(captions), VALIDATION_FRACTION, seed)
        train_unet(pipeline, images[seen], [captions[index] for index in seen], setting.unet, device)
        with whole(folder / "original") as unfinished:
            pipeline.save_pretrained(unfinished)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Where to write a folder's files; it gets its name when all of them are there, so a kill leaves no half of it."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.rename(folder)


def compress(folder: Path, setting: Setting, seed: int, name: str, steps: int) -> None:
    """Makes `folder/name` with recipes/compress_sd.py; without steps, the subnets are only cut."""
    if (folder / name / "model_index.json").exists():
        return
    recipe = setting.joint
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": folder / "original",
        "train_data_dir": folder / "emoji",
        "output_dir": folder / name,
        "cache_dir_latents": folder / "latents",
        "resolution": setting.resolution,
        "validation_fraction": VALIDATION_FRACTION,
        "max_train_steps": steps,
        "train_batch_size": recipe.batch_size,
        "importance_samples": setting.importance_samples,
        "correction_samples": setting.correction_samples,
        "validation_samples": setting.validation_samples,
        "learning_rate": recipe.learning_rate,
        "lr_warmup_steps": min(100, steps // 10),
        "ema_decay": 0.995,
        "validation_steps": max(1, steps),
        "checkpointing_steps": max(1, steps // 4),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "seed": seed,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    words += ["--center_crop", "--sizes", *map(str, setting.sizes)]
    subprocess.run([sys.executable, str(RECIPES / "compress_sd.py"), *words], check=True)


def compress_recorded(folder: Path, captions: list[str], setting: Setting, seed: int) -> None:
    """Makes `folder/recorded` with recipes/compress_any.py: as many steps, and as many rows a step, as `folder/ofa`."""
    if (folder / "recorded" / "model_index.json").exists():
        return
    seen, _ = hold_out(len(captions), VALIDATION_FRACTION, seed)
    chosen = [captions[index] for index in seen] * PASSES
    groups = [chosen[first : first + CAPTIONS_PER_CALL] for first in range(0, len(chosen), CAPTIONS_PER_CALL)]
    (folder / "calls.jsonl").write_text("".join(json.dumps({"prompt": group}) + "\n" for group in groups))
    recipe, rows = setting.joint, 2 * CAPTIONS_PER_CALL  # guidance has two halves
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": folder / "original",
        "calls_file": folder / "calls.jsonl",
        "output_dir": folder / "recorded",
        "steps_per_call": STEPS_PER_CALL,
        "max_train_steps": recipe.steps,
        "train_batch_size": recipe.batch_size // rows,
        "importance_samples": setting.importance_samples // rows,
        "correction_samples": setting.correction_samples // rows,
        "validation_samples": setting.validation_samples // rows,
        "learning_rate": recipe.learning_rate,
        "lr_warmup_steps": min(100, recipe.steps // 10),
        "ema_decay": 0.995,
        "validation_steps": recipe.steps,
        "checkpointing_steps": max(1, recipe.steps // 4),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "seed": seed,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    words += ["--sizes", *map(str, setting.sizes), "--call_arguments", f"num_inference_steps={INFERENCE_STEPS}"]
    words += [f"guidance_scale={GUIDANCE_SCALE}", "output_type=latent"]
    subprocess.run([sys.executable, str(RECIPES / "compress_any.py"), *words], check=True)


@torch.no_grad()
def held_out_losses(folder: Path, setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    """Denoising losses of the original and every size on the pictures that no training saw, with fixed noise."""
    data = runs.Data(
        train_data_dir=str(folder / "emoji"), resolution=setting.resolution, validation_fraction=VALIDATION_FRACTION
    )
    with tempfile.TemporaryDirectory() as scratch:
        settings = runs.RunSettings(
            runs.Model(pretrained_model_name_or_path=str(folder / "original")),
            data,
            runs.Output(output_dir=f"{scratch}/none"),
            captions=runs.Captions(center_crop=True),
            optimization=runs.Optimization(seed=seed),
        )
        run = runs.start(settings)
    batches = list(fixed_batches(run.data.validation, setting.validation_samples, 64, seed, "benchmark"))

    def loss(model: torch.nn.Module) -> float:
        model.to(run.accelerator.device).eval()
        on_device = (send_to_device(batch, run.accelerator.device) for batch in batches)
        return float(torch.cat([denoising_loss(model, batch, run.prepare) for batch in on_device]).mean())

    losses = {"original": {"1": loss(run.denoiser)}}
    for name in ("ofa", "untrained", "recorded"):
        supernet = Supernet.from_pretrained(folder / name / run.original.component)
        for size in supernet.sizes:
            with supernet.at(size) as model:
                losses.setdefault(name, {})[f"{size:g}"] = loss(model)
    return losses


def measure(
    folder: Path,
    reference: torch.Tensor,
    captions: list[str],
    setting: Setting,
    args: argparse.Namespace,
    device: str,
) -> Report:
    """The report on every size, beside the original and the same subnets without joint training."""
    register_extractor(EXTRACTOR, ImageTower(CLIPModel.from_pretrained(folder / "clip")))
    joint = OFAPipeline.from_pretrained(folder / "ofa").to(device)
    original = StableDiffusionPipeline.from_pretrained(folder / "original").to(device)
    compare = {UNTRAINED: "untrained", **({RECORDED: "recorded"} if args.recordings else {})}
    # Prompts from all over the list, whatever the number of samples.
    stride = len(captions) / setting.num_samples
    prompts = [captions[int(index * stride)] for index in range(setting.num_samples)]
    report = evaluate(
        joint,
        reference=reference,
        teacher=original,
        compare={name: OFAPipeline.from_pretrained(folder / each).to(device) for name, each in compare.items()},
        num_samples=setting.num_samples,
        batch_size=100,
        seed=args.seed,
        num_inference_steps=INFERENCE_STEPS,
        arguments={"prompt": prompts},
        call_arguments={"guidance_scale": GUIDANCE_SCALE},
        extractor=EXTRACTOR,
        clip_model=folder / "clip",
        samples_dir=folder / "samples",
        title="Emoji from their names: one Stable Diffusion, every size",
        command=f"python benchmarks/emoji.py --setting {args.setting}",
    )
    report.write(folder)
    if args.recordings:
        losses = held_out_losses(folder, setting, args.seed)
        (folder / "held_out.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(losses, indent=1))
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small text-to-image model on emoji, compress it, and measure every size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", default="emoji", help="folder to make, or of a run to continue")
    add("--setting", choices=tuple(SETTINGS), default="cpu", help="how large everything is")
    add("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    add("--recordings", action="store_true", help="compress once more, on recordings of the pipeline's own calls")
    add("--seed", type=int, default=0, help="of everything random")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        benchmark(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()

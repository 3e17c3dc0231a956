"""The whole path on real images, offline, in minutes: scikit-learn's handwritten digits.

    python recipes/demo.py --output_dir demo

trains a small class-conditional diffusion model (a UNet, or with `--denoiser dit` a transformer), compresses it to six
sizes in one joint run, samples every size from the same seeds, and measures each against digits that no training saw.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import compress_ddpm
import compress_dit
import extract
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from tqdm.auto import tqdm

from ofadiff import OFAPipeline, evaluate
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import image_folder
from ofadiff.data.order import hold_out, load_batches, step_batches
from ofadiff.denoisers.class_labels import keep_labels, prepare_class_labels
from ofadiff.denoisers.prepare import Prepare, prepare_pixels
from ofadiff.evaluation import VALIDATION_LOSS, Report, register_extractor
from ofadiff.evaluation.report.rows import TEACHER
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.training.losses import denoising_loss
from ofadiff.training.train import TrainingResult

RESOLUTION = 16
CLASSES = 10
VALIDATION_FRACTION = 0.25
BATCH_SIZE = 32
INFERENCE_STEPS = 15
EXTRACTED = (0.5, 0.7)
EXTRACTOR = "digits classifier"
UNTRAINED = "not trained jointly"


@dataclass(frozen=True)
class Kind:
    """A kind of denoiser.

    Attributes:
        make: Makes one, untrained.
        prepare: Its inputs, with a scheduler to be bound.
        recipe: What compresses it.
        learning_rate: Of its training from scratch, at its peak.
        sizes: What it is compressed to. A third of a DiT's weights turns time and class into shifts and scales of the
            whole residual stream, and stays.
    """

    make: Callable[[], ModelMixin]
    prepare: Callable[..., Prepare]
    recipe: ModuleType
    learning_rate: float
    sizes: tuple[float, ...]


def make_unet() -> UNet2DModel:
    """A small UNet of grey pixels."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        num_class_embeds=CLASSES,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def make_dit() -> DiTTransformer2DModel:
    """A small DiT of grey pixels."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=4,
        sample_size=RESOLUTION,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    keep_labels(transformer)
    return transformer


KINDS = {
    "unet": Kind(make_unet, prepare_pixels, compress_ddpm, 2e-3, (0.4, 0.5, 0.6, 0.7, 0.85, 1.0)),
    "dit": Kind(
        make_dit,
        functools.partial(prepare_class_labels, null_class=CLASSES),
        compress_dit,
        1e-3,
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ),
}


def demo(args: argparse.Namespace) -> Report:
    """Makes everything in `args.output_dir`.

    Raises:
        ValueError: If the folder holds something already.
    """
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not empty; choose another one or remove it")
    torch.manual_seed(args.seed)

    print("1/5  Digits: 1797 real images, a quarter of them held out", flush=True)
    write_digits(folder / "digits")
    images = image_folder(folder / "digits")
    seen, held_out = hold_out(len(images.names), VALIDATION_FRACTION, args.seed)
    train_data = ImageData(images, RESOLUTION, channels=1, indices=seen)
    reference = as_uint8(ImageData(images, RESOLUTION, channels=1, indices=held_out))
    register_extractor(EXTRACTOR, train_classifier(train_data, args.seed))

    kind = KINDS[args.denoiser]
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    teacher = kind.make()
    print(f"2/5  Teacher: a class-conditional {type(teacher).__name__}, trained from scratch", flush=True)
    train_teacher(teacher, kind, train_data, scheduler, args.teacher_steps, args.seed)
    DDPMPipeline(teacher, scheduler).save_pretrained(folder / "teacher")

    print("3/5  Compression: six sizes in one joint run", flush=True)
    compression = kind.recipe.make_parser().parse_args(
        [
            *("--pretrained_model_name_or_path", str(folder / "teacher")),
            *("--train_data_dir", str(folder / "digits")),
            *("--output_dir", str(folder / "ofa")),
            *("--sizes", *map(str, kind.sizes)),
            *("--validation_fraction", str(VALIDATION_FRACTION)),
            *("--validation_samples", str(args.validation_samples)),
            *("--max_train_steps", str(args.joint_steps)),
            *("--train_batch_size", str(BATCH_SIZE)),
            *("--learning_rate", "5e-4"),
            *("--ema_decay", "0.995"),
            *("--validation_steps", str(args.joint_steps)),
            *("--checkpointing_steps", str(args.joint_steps)),
            *("--num_validation_images", "0"),
            *("--seed", str(args.seed)),
        ]
    )
    setup = kind.recipe.set_up(compression)
    # The same subnets as they are before joint training, to compare with.
    DDPMPipeline(setup.supernet.model, scheduler).save_pretrained(folder / "untrained")
    setup.supernet.save_pretrained(folder / "untrained" / "unet")
    result = kind.recipe.train_and_save(compression, setup)

    print("4/5  Evaluation: every size from the same seeds", flush=True)
    report = measure(folder, reference, result, args)

    print("5/5  Two sizes as plain diffusers pipelines", flush=True)
    extraction = ["--checkpoint", str(folder / "ofa"), "--sizes", *map(str, EXTRACTED), "--output_dir", str(folder)]
    extract.extract(extract.make_parser().parse_args(extraction))

    print(f"\n{report.table()}\n\n{folder / 'report.html'} shows it all.")
    return report


def measure(folder: Path, reference: torch.Tensor, result: TrainingResult, args: argparse.Namespace) -> Report:
    """The report on every size, beside the teacher and the same subnets without joint training."""
    pipelines = {name: OFAPipeline.from_pretrained(folder / name) for name in ("ofa", "untrained")}
    denoiser = type(pipelines["ofa"].unet).from_pretrained(folder / "teacher" / "unet")
    teacher = ClassConditionalDDPMPipeline(denoiser, pipelines["ofa"].scheduler)
    for pipeline in (*pipelines.values(), teacher):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    report = evaluate(
        pipelines["ofa"],
        reference=reference,
        teacher=teacher,
        compare={UNTRAINED: pipelines["untrained"]},
        num_samples=args.num_samples,
        batch_size=100,
        seed=args.seed,
        num_inference_steps=INFERENCE_STEPS,
        extractor=EXTRACTOR,
        cost_batch_size=16,
        title="Handwritten digits: one model, six sizes",
        command=f"python recipes/demo.py --denoiser {args.denoiser} --output_dir {args.output_dir}",
    )
    first, last = result.history[0], result.history[max(result.history)]
    report.add_column("validation_loss", VALIDATION_LOSS, {**last, TEACHER: result.teacher_loss})
    report.add_column("validation_loss", VALIDATION_LOSS, first, series=UNTRAINED)
    report.write(folder)
    return report


def write_digits(folder: Path) -> None:
    """The 8x8 digits as 16x16 grey PNG files, a subfolder per class."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
        image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).save(path)


def as_uint8(data: ImageData) -> torch.Tensor:
    """All images of a data set as uint8 RGB `(N, 3, H, W)`."""
    pixels = torch.stack([data[index, 0]["pixel_values"] for index in range(len(data))])
    return ((pixels + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


class DigitFeatures(nn.Module):
    """A small convolutional classifier; its features are the last hidden layer, normalised, `(N, 64)`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (RESOLUTION // 4) ** 2, 64), nn.ReLU(), nn.BatchNorm1d(64)),
        )
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB images `(N, 3, H, W)` to features `(N, 64)`."""
        return self.hidden(images[:, :1].float() / 127.5 - 1)


def train_classifier(data: ImageData, seed: int, epochs: int = 10) -> DigitFeatures:
    """The feature extractor of FID and KID: Inception's weights know no digits, and cannot be fetched offline."""
    classifier = DigitFeatures()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    steps = range(epochs * len(data) // BATCH_SIZE)
    for batch in load_batches(data, list(step_batches(len(data), steps, 1, BATCH_SIZE, seed))):
        logits = classifier.classes(classifier.hidden(batch["pixel_values"]))
        F.cross_entropy(logits, batch["class_labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier


def train_teacher(
    teacher: ModelMixin, kind: Kind, data: ImageData, scheduler: DDPMScheduler, steps: int, seed: int
) -> None:
    """Trains a denoiser from scratch, in place, on the denoising loss; it ends with its averaged weights."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=kind.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    ema = EMAModel(teacher.parameters(), decay=0.995, use_ema_warmup=True, power=3 / 4)
    prepare = functools.partial(kind.prepare, noise_scheduler=scheduler)
    for batch in tqdm(load_batches(data, list(step_batches(len(data), range(steps), 1, BATCH_SIZE, seed))), "Teacher"):
        denoising_loss(teacher, batch, prepare).mean().backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(teacher.parameters())
    ema.copy_to(teacher.parameters())
    teacher.eval()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compress a small digits model to six sizes and measure them: about ten minutes on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", default="demo", help="folder to make; must be new or empty")
    add("--denoiser", choices=tuple(KINDS), default="unet", help="what kind of model is trained and compressed")
    add("--teacher_steps", type=int, default=1000, help="training steps of the original model")
    add("--joint_steps", type=int, default=800, help="training steps of the joint run")
    add("--num_samples", type=int, default=300, help="images sampled at every size")
    add("--validation_samples", type=int, default=1024, help="noisy images of a validation loss")
    add("--seed", type=int, default=0, help="of everything random")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        demo(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()

"""The whole path on real images, offline, in minutes: scikit-learn's handwritten digits.

    python recipes/demo.py --output_dir demo

trains a small class-conditional diffusion model (a UNet, or with `--denoiser dit` a transformer), compresses it to six
sizes in one joint run, samples every size from the same seeds, and measures each against digits that no training saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from cyclopts import Parameter
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
from ofadiff.commands.command import main, script
from ofadiff.commands.compress import make_supernet
from ofadiff.commands.extract import Extraction, extract
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import image_folder
from ofadiff.data.order import hold_out, load_batches, step_batches
from ofadiff.denoisers import DenoiserKind, Encoder, prepare_batch
from ofadiff.denoisers.dit import DIT
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.evaluation import VALIDATION_LOSS, Report, register_extractor
from ofadiff.evaluation.report.rows import TEACHER
from ofadiff.noise.diffusion import diffuse
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.runs import (
    Compression,
    Data,
    Model,
    Optimization,
    Output,
    RunSettings,
    TrainingResult,
    Watching,
    save,
    start,
    train_jointly,
)
from ofadiff.training.losses import denoising_loss
from ofadiff.values import COUNT, COUNT_OR_NONE, WHOLE, Bundle, one_of

RESOLUTION = 16
CLASSES = 10
VALIDATION_FRACTION = 0.25
BATCH_SIZE = 32
INFERENCE_STEPS = 15
EXTRACTED = (0.5, 0.7)
EXTRACTOR = "digits classifier"
UNTRAINED = "not trained jointly"


@dataclass(frozen=True)
class Demonstrated:
    """What is trained and compressed.

    Attributes:
        make: Makes one, untrained.
        kind: How it is called.
        learning_rate: Of its training from scratch, at its peak.
        sizes: What it is compressed to. A third of a DiT's weights turns time and class into shifts and scales of the
            whole residual stream, and stays.
    """

    make: Callable[[], ModelMixin]
    kind: DenoiserKind
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
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=4,
        sample_size=RESOLUTION,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )


DENOISERS = {
    "unet": Demonstrated(make_unet, UNET_2D, 2e-3, (0.4, 0.5, 0.6, 0.7, 0.85, 1.0)),
    "dit": Demonstrated(make_dit, DIT, 1e-3, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Demo(Bundle):
    """How large the demo is."""

    output_dir: str = "demo"
    """folder to make; must be new or empty"""
    denoiser: Annotated[str, one_of(DENOISERS)] = "unet"
    """what kind of model is trained and compressed: unet or dit"""
    teacher_steps: Annotated[int, COUNT] = 1000
    """training steps of the original model"""
    joint_steps: Annotated[int, COUNT] = 800
    """training steps of the joint run"""
    correction_samples: Annotated[int, COUNT_OR_NONE] = 384
    """noisy images on which the sizes are fitted before they are trained"""
    num_samples: Annotated[int, COUNT] = 300
    """images sampled at every size"""
    validation_samples: Annotated[int, COUNT] = 1024
    """noisy images of a validation loss"""
    seed: Annotated[int, WHOLE] = 0
    """of everything random"""


def demo(*, settings: Demo = Demo()) -> Report:
    """Compress a small digits model to six sizes and measure them: about ten minutes on two CPU cores.

    Raises:
        ValueError: If the output folder holds something already.
    """
    folder, shown = Path(settings.output_dir), DENOISERS[settings.denoiser]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not empty; choose another one or remove it")
    torch.manual_seed(settings.seed)

    print("1/5  Digits: 1797 real images, a quarter of them held out", flush=True)
    write_digits(folder / "digits")
    images = image_folder(folder / "digits")
    seen, held_out = hold_out(len(images.names), VALIDATION_FRACTION, settings.seed)
    train_data = ImageData(images, RESOLUTION, channels=1, indices=seen)
    reference = as_uint8(ImageData(images, RESOLUTION, channels=1, indices=held_out))
    register_extractor(EXTRACTOR, train_classifier(train_data, settings.seed))

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    teacher = shown.make()
    print(f"2/5  Teacher: a class-conditional {type(teacher).__name__}, trained from scratch", flush=True)
    train_teacher(teacher, shown, train_data, scheduler, settings)
    DDPMPipeline(teacher, scheduler).save_pretrained(folder / "teacher")

    print("3/5  Compression: six sizes in one joint run", flush=True)
    run = start(compression_settings(folder, shown, settings))
    supernet = make_supernet(run)
    # The same subnets as they are before joint training, to compare with.
    DDPMPipeline(supernet.model, scheduler).save_pretrained(folder / "untrained")
    result = train_jointly(run, supernet)
    save(run, supernet, result)

    print("4/5  Evaluation: every size from the same seeds", flush=True)
    report = measure(folder, reference, result, settings)

    print("5/5  Two sizes as plain diffusers pipelines", flush=True)
    extract(extraction=Extraction(checkpoint=str(folder / "ofa"), sizes=EXTRACTED, output_dir=str(folder)))

    print(f"\n{report.table()}\n\n{folder / 'report.html'} shows it all.")
    return report


def compression_settings(folder: Path, shown: Demonstrated, settings: Demo) -> RunSettings:
    """What the joint run is asked for."""
    return RunSettings(
        Model(pretrained_model_name_or_path=str(folder / "teacher")),
        Data(train_data_dir=str(folder / "digits"), validation_fraction=VALIDATION_FRACTION),
        Output(output_dir=str(folder / "ofa")),
        compression=Compression(sizes=shown.sizes, correction_samples=settings.correction_samples),
        optimization=Optimization(
            max_train_steps=settings.joint_steps,
            train_batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            seed=settings.seed,
        ),
        watching=Watching(
            validation_samples=settings.validation_samples,
            validation_steps=settings.joint_steps,
            checkpointing_steps=settings.joint_steps,
            num_validation_images=0,
        ),
    )


def measure(folder: Path, reference: torch.Tensor, result: TrainingResult, settings: Demo) -> Report:
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
        num_samples=settings.num_samples,
        batch_size=100,
        seed=settings.seed,
        num_inference_steps=INFERENCE_STEPS,
        extractor=EXTRACTOR,
        cost_batch_size=16,
        title="Handwritten digits: one model, six sizes",
        command=f"python recipes/demo.py --denoiser {settings.denoiser} --output_dir {settings.output_dir}",
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
    teacher: ModelMixin, shown: Demonstrated, data: ImageData, scheduler: DDPMScheduler, settings: Demo
) -> None:
    """Trains a denoiser from scratch, in place, on the denoising loss; it ends with its averaged weights."""
    kind, steps = shown.kind, settings.teacher_steps
    if kind.begin_training is not None:
        kind.begin_training(teacher)
    null_class = None if kind.null_class is None else kind.null_class(teacher.config)
    prepare = functools.partial(
        prepare_batch,
        kind=kind,
        config=teacher.config,
        forward_process=functools.partial(diffuse, noise_scheduler=scheduler),
        encode=Encoder(DDPMPipeline(teacher, scheduler), kind, null_class, class_dropout_prob=0.1),
    )
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=shown.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    ema = EMAModel(teacher.parameters(), decay=0.995, use_ema_warmup=True, power=3 / 4)
    batches = list(step_batches(len(data), range(steps), 1, BATCH_SIZE, settings.seed))
    for batch in tqdm(load_batches(data, batches), "Teacher"):
        denoising_loss(teacher, batch, prepare).mean().backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(teacher.parameters())
    ema.copy_to(teacher.parameters())
    teacher.eval()


if __name__ == "__main__":
    main(script(demo, __file__))

"""What `quality.py` compresses: the studies with their images, their teachers and the features that they are judged by.

The images of a study are in three parts that share none: `training`, `tuning`, which methods may be chosen on, and
`judging`, a quarter, on which nothing is ever chosen. Everything here is made once and used again, by any process:

    <output_dir>/<study>/images/<part>/        the images; with a subfolder per class
    <output_dir>/<study>/teacher/              the original model, a plain `DDPMPipeline` folder (model_index.json,
                                               unet/, scheduler/); one that was put there by hand is used as it is
    <output_dir>/<study>/features.safetensors  the network whose features FID and the like are taken in
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ofadiff.data.image_data import ImageData
from ofadiff.data.images import image_folder
from ofadiff.data.order import fixed_batches, hold_out, load_batches, step_batches
from ofadiff.denoisers import Encoder, prepare_batch
from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.prepare import Prepare
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.noise.diffusion import diffuse
from ofadiff.noise.draws import Batch
from ofadiff.training.losses import denoising_loss
from ofadiff.training.validation import averaged_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import demo
from emoji_data import FONT, check_font, draw_emoji

PARTS = ("training", "tuning", "judging")
# A quarter is judged on: the images that the demo and data_free.py hold out. Of the others so many are tuned on.
JUDGING, TUNING = demo.VALIDATION_FRACTION, 0.15
BATCH_SIZE = 32
# What AdamW keeps of a weight, and how often a long run keeps where it is.
MOMENTS = ("exp_avg", "exp_avg_sq")
HALFWAY_STEPS = 100
EMA_DECAY = 0.995
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# How often a teacher's loss on images that it is not trained on is looked at, over its training.
LOOKS = 6
# A word is learnt if so many names of training images have it.
FEWEST_NAMES = 6


@dataclass(frozen=True)
class Study:
    """A data set with a model of it.

    Attributes:
        write: Writes all images into a folder, and `names.json` where they have names.
        make: Makes the model, untrained.
        kind: How it is called.
        sizes: What it is compressed to, fractions of its parameters.
        learning_rate: Of its training from scratch, at its peak.
        teacher_steps: Steps after which it has stopped learning.
        channels: Of the images.
        resolution: Side of the images.
        features: Trains the feature extractor: (training images, their names by file) -> the network.
        empty_features: What the weights of that network are loaded into.
        random_flip: Whether half of the training images are mirrored.
        inference_steps: Denoising steps of a sample.
    """

    write: Callable[[Path], None]
    make: Callable[[], ModelMixin]
    kind: DenoiserKind
    sizes: tuple[float, ...]
    learning_rate: float
    teacher_steps: int
    channels: int
    resolution: int
    features: Callable[[ImageData, Mapping[str, str]], nn.Module]
    empty_features: Callable[[], nn.Module]
    random_flip: bool = False
    inference_steps: int = demo.INFERENCE_STEPS


@dataclass(frozen=True)
class Place:
    """A study with its folder: images, teacher, and how the teacher is trained and called.

    Attributes:
        study: The study.
        folder: Of the study, in the output folder.
        settings: What the teacher's training was asked for: its steps and what is random about it.
    """

    study: Study
    folder: Path
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def teacher_folder(self) -> Path:
        """The teacher's pipeline."""
        return self.folder / "teacher"

    def images_folder(self, part: str) -> Path:
        """The images of a part."""
        return self.folder / "images" / part

    def data(self, part: str, model: ModelMixin) -> ImageData:
        """The images of a part, with their classes if the model wants them."""
        study, images = self.study, image_folder(self.images_folder(part))
        if study.kind.classes is None or study.kind.classes(model) is None:
            images = replace(images, labels=None)
        flip = study.random_flip and part == "training"
        return ImageData(images, study.resolution, study.channels, random_flip=flip)

    def teacher(self) -> ModelMixin:
        """The original model, in eval mode."""
        model_class = type(self.study.make())
        return model_class.from_pretrained(self.teacher_folder / "unet").eval().to(DEVICE)

    def scheduler(self) -> DDPMScheduler:
        """As it was saved: a configuration that was not leaves out what were defaults, and another class has others."""
        return DDPMScheduler.from_pretrained(self.teacher_folder / "scheduler")

    def prepare(self, model: ModelMixin, scheduler: DDPMScheduler, training: bool) -> Prepare:
        """Makes inputs of a batch; in training of a model with a class of nothing a tenth of the labels is left out."""
        kind, encode = self.study.kind, None
        if training:
            null_class = None if kind.null_class is None else kind.null_class(model.config)
            encode = Encoder(DDPMPipeline(model, scheduler), kind, null_class, class_dropout_prob=0.1)
        process = functools.partial(diffuse, noise_scheduler=scheduler)
        return functools.partial(prepare_batch, kind=kind, config=model.config, forward_process=process, encode=encode)


# Images.


@contextmanager
def made_whole(folder: Path):
    """A folder to fill, which gets its name when the block ends: what was cut off never looks finished."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if not folder.exists():
        unfinished.rename(folder)


def write_parts(place: Place) -> None:
    """The images of a study in their three parts."""
    if (place.folder / "images").exists():
        return
    with made_whole(place.folder / "images") as folder:
        place.study.write(folder / "all")
        files = [Path(name) for name in image_folder(folder / "all").names]
        rest, judging = hold_out(len(files), JUDGING, 0)
        training, tuning = hold_out(len(rest), TUNING, 1)
        chosen = {"training": [rest[i] for i in training], "tuning": [rest[i] for i in tuning], "judging": judging}
        for part, indices in chosen.items():
            for index in indices:
                target = folder / part / files[index].relative_to(folder / "all")
                target.parent.mkdir(parents=True, exist_ok=True)
                files[index].rename(target)
        if (folder / "all" / "names.json").exists():
            (folder / "all" / "names.json").rename(folder / "names.json")
        shutil.rmtree(folder / "all")


def write_emoji(folder: Path, resolution: int = 32) -> None:
    """Colour emoji as PNG files, and what Unicode calls them."""
    check_font(FONT)
    from PIL import Image

    folder.mkdir(parents=True)
    names = {}
    for index, (name, picture) in enumerate(draw_emoji(FONT)):
        picture.resize((resolution, resolution), Image.Resampling.LANCZOS).save(folder / f"{index:04}.png")
        names[f"{index:04}.png"] = unicodedata.normalize("NFKC", name)
    (folder / "names.json").write_text(json.dumps(names, indent=0), encoding="utf-8")


def names_of(place: Place) -> dict[str, str]:
    """What images are called, by the names of their files; nothing where they have no names."""
    file = place.folder / "images" / "names.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# Features.


class EmojiFeatures(nn.Module):
    """A small convolutional network; its features are the last hidden layer, normalised, `(N, 64)`."""

    def __init__(self, words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        head = (nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU(), nn.BatchNorm1d(64))
        self.hidden = nn.Sequential(*layers, *head)
        self.words = nn.Linear(64, words)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB images `(N, 3, 32, 32)` to features `(N, 64)`."""
        return self.hidden(images.float() / 127.5 - 1)


def learn_words(data: ImageData, names: Mapping[str, str], epochs: int = 40) -> EmojiFeatures:
    """Features in which the words of an emoji's name can be seen, from images that are shifted and brightened."""
    texts = [set(names[Path(name).name].replace("-", " ").split()) for name in data.images.names]
    counts = Counter(word for text in texts for word in text)
    words = sorted(word for word, count in counts.items() if count >= FEWEST_NAMES)
    target = torch.tensor([[float(word in text) for word in words] for text in texts])
    pixels = torch.stack([data[index, 0]["pixel_values"] for index in range(len(data))])
    network = EmojiFeatures(len(words))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    positive = (1 / target.mean(dim=0).clamp_min(1e-3)).sqrt()
    order = random.Random(0)
    for _ in tqdm(range(epochs), "Features"):
        shuffled = torch.tensor(order.sample(range(len(pixels)), len(pixels)))
        for batch in shuffled.tensor_split(max(1, len(pixels) // 64)):
            shift = order.randrange(-3, 4), order.randrange(-3, 4)
            views = torch.roll(F.pad(pixels[batch], (3, 3, 3, 3), value=1.0), shift, (2, 3))[..., 3:-3, 3:-3]
            logits = network.words(network.hidden(views * (0.8 + 0.2 * torch.rand(len(batch), 1, 1, 1))))
            F.binary_cross_entropy_with_logits(logits, target[batch], pos_weight=positive).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def load_features(place: Place) -> nn.Module:
    """The feature extractor of a study, trained on its training part where it is not there yet."""
    file = place.folder / "features.safetensors"
    if not file.exists():
        images = image_folder(place.images_folder("training"))
        torch.manual_seed(0)
        data = ImageData(images, place.study.resolution, place.study.channels)
        trained = place.study.features(data, names_of(place))
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file(trained.state_dict(), unfinished)
        unfinished.replace(file)
    weights = load_file(file)
    network = place.study.empty_features(weights)
    network.load_state_dict(weights)
    return network.eval().to(DEVICE)


# Training as every method has it that is not the library's own.


def fit(
    weights: Sequence[nn.Parameter],
    loss_fn: Callable[[int, Batch], Tensor],
    data: ImageData,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    name: str,
    watch: Callable[[int, EMAModel], None] | None = None,
    halfway: Path | None = None,
) -> None:
    """The library's schedule: AdamW, warm-up, cosine, clipped gradients; the weights end with their average.

    Args:
        weights: What is trained, in place.
        loss_fn: (step, batch) -> losses of the batch, `(N,)`.
        data: The images; the same ones in the same order, with the same noise, for every method of a seed.
        steps: Optimizer steps.
        learning_rate: Its peak.
        seed: Of images and noise.
        name: What the progress bar says.
        watch: Called after each step with the steps made and the average.
        halfway: A file that keeps where a long run is, so that it goes on when it is started again.
    """
    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps(steps), steps)
    ema = EMAModel(weights, decay=EMA_DECAY, use_ema_warmup=True, power=3 / 4, foreach=True)
    begun = 0 if halfway is None or not halfway.exists() else read_halfway(halfway, weights, optimizer, schedule, ema)
    keys = list(step_batches(len(data), range(begun, steps), 1, BATCH_SIZE, seed))
    for step, batch in enumerate(tqdm(load_batches(data, keys), name, len(keys), mininterval=5), begun):
        loss_fn(step, send_to_device(batch, DEVICE)).mean().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(weights)
        if watch is not None:
            watch(step + 1, ema)
        if halfway is not None and (step + 1) % HALFWAY_STEPS == 0:
            write_halfway(halfway, weights, optimizer, ema)
    ema.copy_to(weights)


def write_halfway(file: Path, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
    """Keeps the state of `fit` in a file, which is the old one or the new one at any time."""
    tensors = {"step": torch.tensor(ema.optimization_step)}
    for index, (weight, average) in enumerate(zip(weights, ema.shadow_params, strict=True)):
        moments = {name: optimizer.state[weight][name] for name in MOMENTS}
        tensors |= {f"{name}.{index}": tensor for name, tensor in moments.items()}
        tensors |= {f"weight.{index}": weight.detach(), f"average.{index}": average}
    unfinished = file.with_name(f".{file.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, file)


@torch.no_grad()
def read_halfway(
    file: Path,
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel,
) -> int:
    """Brings the parts of `fit` to where a file was written; returns the steps made until then."""
    tensors = load_file(file)
    step = int(tensors["step"])
    for index, (weight, average) in enumerate(zip(weights, ema.shadow_params, strict=True)):
        weight.copy_(tensors[f"weight.{index}"])
        average.copy_(tensors[f"average.{index}"])
        moments = {name: tensors[f"{name}.{index}"].to(weight.device) for name in MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    ema.optimization_step = step
    with warnings.catch_warnings():  # these steps of the schedule had their steps of the optimizer in another process
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(step):
            schedule.step()
    return step


def warmup_steps(steps: int) -> int:
    """Steps over which the learning rate rises: the library's 100, less where a run is short."""
    return min(100, steps // 8)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], prepare: Prepare) -> float:
    """Mean denoising loss over batches of noisy images."""
    batches = (send_to_device(batch, DEVICE) for batch in batches)
    return float(torch.cat([denoising_loss(model, batch, prepare).cpu() for batch in batches]).double().mean())


def train_teacher(place: Place) -> None:
    """The original model; prints its loss on the tuning part on the way, which shows whether it has stopped falling."""
    if place.teacher_folder.exists():
        return
    study, steps = place.study, place.settings["teacher_steps"]
    torch.manual_seed(0)
    model, scheduler = study.make().to(DEVICE).train(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if study.kind.begin_training is not None:
        study.kind.begin_training(model)
    prepare = place.prepare(model, scheduler, training=True)
    judged = place.prepare(model, scheduler, training=False)
    held_out = list(fixed_batches(place.data("tuning", model), 512, 128, 0, "teacher"))
    kept = place.folder / "teacher_losses.json"
    losses = json.loads(kept.read_text()) if kept.exists() else {}

    def watch(step: int, ema: EMAModel) -> None:
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            model.eval()
            with averaged_weights(ema, list(model.parameters()), model):
                losses[str(step)] = mean_loss(model, held_out, judged)
            kept.write_text(json.dumps(losses) + "\n")
            print(f"\nTeacher after {step} steps: {losses[str(step)]:.5f} on the tuning part", flush=True)
            model.train()

    options = {"steps": steps, "learning_rate": study.learning_rate, "seed": 0, "name": "Teacher", "watch": watch}
    fit(
        list(model.parameters()),
        lambda step, batch: denoising_loss(model, batch, prepare),
        place.data("training", model),
        halfway=place.folder / "teacher_halfway.safetensors",
        **options,
    )
    with made_whole(place.teacher_folder) as folder:
        DDPMPipeline(model.eval().cpu(), scheduler).save_pretrained(folder)
    (place.folder / "teacher_halfway.safetensors").unlink(missing_ok=True)


def prepare_place(place: Place) -> None:
    """Makes what is missing of images, teacher and features."""
    write_parts(place)
    train_teacher(place)
    load_features(place)


# The studies. A further one is an entry here.


def make_emoji_unet() -> UNet2DModel:
    """A small UNet of colour pixels, unconditional: few channels where images are large, which is what takes time."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def digits_study(denoiser: str, sizes: tuple[float, ...], teacher_steps: int) -> Study:
    """The demo's digits with one of its models."""
    shown = demo.DENOISERS[denoiser]
    return Study(
        write=demo.write_digits,
        make=shown.make,
        kind=shown.kind,
        sizes=sizes,
        learning_rate=shown.learning_rate,
        teacher_steps=teacher_steps,
        channels=1,
        resolution=demo.RESOLUTION,
        features=lambda data, names: demo.train_classifier(data, 0),
        empty_features=lambda weights: demo.DigitFeatures(),
    )


STUDIES = {
    "digits-unet": digits_study("unet", (0.35, 0.45, 0.6, 0.8, 1.0), 3500),
    "digits-dit": digits_study("dit", (0.5, 0.6, 0.7, 0.85, 1.0), 6000),
    "emoji-unet": Study(
        write=write_emoji,
        make=make_emoji_unet,
        kind=UNET_2D,
        # The paper's smallest subnet has 0.37.
        sizes=(0.4, 0.5, 0.65, 0.8, 1.0),
        learning_rate=1e-3,
        teacher_steps=4000,
        channels=3,
        resolution=32,
        features=learn_words,
        empty_features=lambda weights: EmojiFeatures(len(weights["words.bias"])),
        random_flip=True,
    ),
}

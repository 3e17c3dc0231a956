"""Ten thousand changes of size, with images in between: nothing is left behind, and sizes give what they gave at first.

A tiny UNet and a tiny transformer of random weights, some of whose branches the small sizes drop. Images are compared
bit for bit: after changes of size, in two threads that sample at different sizes at once, and of pipelines that were
pickled, copied, and moved between devices and dtypes. What is held is the resident set, live tensors and other live
objects, after a tenth of the changes and at the end. The exit status is 1 if anything is missed.

python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import os
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiTTransformer2DModel, ModelMixin, UNet2DModel

from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, score_channels
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline

SIZES = (0.5, 0.75, 1.0)
CLASSES = 4
SWITCHES, IMAGE_EVERY = 10_000, 5

# If every change of size left a tensor of one number behind, it would be 2 MB or more.
MAX_GROWTH = 2 * 2**20

# What the smaller sizes of a group are worth: one in four branches is dropped.
WORTH = (1.0, 8.0, 0.05, 3.0)


@dataclass(frozen=True)
class Held:
    """What the process holds: bytes of its resident set, live tensors, and all live objects that can hold others."""

    resident: int
    tensors: int
    objects: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
        return cls(psutil.Process().memory_info().rss, tensors, len(objects))


@dataclass(frozen=True)
class Soaked:
    """What came of many changes of size.

    Attributes:
        switches: Changes of size.
        images: Images that were made in between.
        differing: Those of them that are not, bit for bit, what their size gave at first.
        before: What was held after the first tenth of the changes.
        after: What was held after the last.
    """

    switches: int
    images: int
    differing: int
    before: Held
    after: Held


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES,
    )


def transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
    )


DENOISERS: dict[str, Callable[[], ModelMixin]] = {"UNet": unet, "transformer": transformer}


def make_pipeline(denoiser: str, folder: Path) -> Any:
    """The pipeline of one of `DENOISERS`, as it is loaded from a checkpoint in a folder, which this writes."""
    torch.manual_seed(0)
    model = DENOISERS[denoiser]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what begins as zeros, or as ones, shall count
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    for group, worth in zip(groups, itertools.cycle(WORTH), strict=False):
        scores[group.name] = scores[group.name] * worth
    subnets = allocate(model, groups, scores, sizes=SIZES, budget="channels", min_keep=0)
    supernet = Supernet(model, groups, scores, subnets)
    DDPMPipeline(model, DDIMScheduler(num_train_timesteps=50, clip_sample=False)).save_pretrained(folder)
    supernet.save_pretrained(folder / "unet")
    return load(folder)


def load(folder: Path) -> Any:
    pipeline = OFAPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, size: float | None = None) -> torch.Tensor:
    """Images of two classes, `(2, 1, 8, 8)`, in two steps; by default at the size that is set."""
    generator = torch.Generator().manual_seed(0)
    return pipeline([0, CLASSES - 1], generator, 2, "pt", size=size).images.cpu()


def images_of(pipeline: Any) -> dict[float, torch.Tensor]:
    """What every size gives."""
    return {size: sample(pipeline, size) for size in pipeline.sizes}


def same(images: dict[float, torch.Tensor], expected: dict[float, torch.Tensor]) -> bool:
    """Whether every size gives the same, bit for bit, and no two sizes do."""
    differ = all(not torch.equal(a, b) for a, b in itertools.combinations(expected.values(), 2))
    return differ and all(torch.equal(images[size], expected[size]) for size in expected)


def soak(pipeline: Any, switches: int, image_every: int = IMAGE_EVERY) -> Soaked:
    """Changes the size, to any of the others, and samples in between."""
    expected, chance = images_of(pipeline), random.Random(0)
    images = differing = 0
    warm = math.ceil(switches / 10)
    before = Held.now()
    for number in range(switches):
        if number == warm:
            before = Held.now()
        size = chance.choice([other for other in pipeline.sizes if other != pipeline.size])
        pipeline.set_size(size)
        if number % image_every == 0:
            images += 1
            differing += not torch.equal(sample(pipeline), expected[size])
    return Soaked(switches, images, differing, before, Held.now())


def sampled_in_threads(pipeline: Any, rounds: int) -> bool:
    """Whether two threads that sample at different sizes at once get what one gets."""
    expected = images_of(pipeline)

    def thread(offset: int) -> bool:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        own = OFAPipeline.from_pipe(pipeline, ClassConditionalDDPMPipeline, scheduler=scheduler)
        own.set_progress_bar_config(disable=True)
        sizes = [pipeline.sizes[(number + offset) % len(pipeline.sizes)] for number in range(rounds)]
        return sum(not torch.equal(sample(own, size), expected[size]) for size in sizes) == 0

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            return all(pool.map(thread, (0, 1)))
    finally:
        sys.setswitchinterval(interval)


def pickled(pipeline: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(pipeline))


def deep_copied(pipeline: Any, folder: Path) -> Any:
    return copy.deepcopy(pipeline)


def saved_and_loaded(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder / "again")
    return load(folder / "again")


def through_float64(pipeline: Any, folder: Path) -> Any:
    return copy.deepcopy(pipeline).to(torch.float64).to(torch.float32)


def through_meta(pipeline: Any, folder: Path) -> Any:
    """To the device without memory and back; what the model held is copied in."""
    moved = copy.deepcopy(pipeline)
    moved.unet.to("meta")
    moved.unet.to_empty(device="cpu")
    held = itertools.chain(pipeline.unet.parameters(), pipeline.unet.buffers())
    with torch.no_grad():
        for empty, full in zip(itertools.chain(moved.unet.parameters(), moved.unet.buffers()), held, strict=True):
            empty.copy_(full)
    return moved


def through_the_gpu(pipeline: Any, folder: Path) -> Any:
    return copy.deepcopy(pipeline).to("cuda").to("cpu")


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "pickled": pickled,
    "deep-copied": deep_copied,
    "saved and loaded": saved_and_loaded,
    "moved to float64 and back": through_float64,
    "moved to meta and back": through_meta,
    "moved to the GPU and back": through_the_gpu,
}


def is_faithful(pipeline: Any, folder: Path, way: str) -> bool:
    """Whether a copy gives what its original gives, at the size that was set and at all, and leaves that alone."""
    expected = images_of(pipeline)
    pipeline.set_size(SIZES[1])
    made = COPIES[way](pipeline, folder)
    at_its_size = sample(made, None if way != "saved and loaded" else SIZES[1])
    made.set_size(SIZES[0])
    with torch.no_grad():
        ours = dict(made.unet.named_parameters())
        apart = all(
            parameter.data_ptr() != ours[name].data_ptr() for name, parameter in pipeline.unet.named_parameters()
        )
    alone = pipeline.size == SIZES[1] and torch.equal(sample(pipeline), expected[SIZES[1]])
    return apart and alone and torch.equal(at_its_size, expected[SIZES[1]]) and same(images_of(made), expected)


def is_cast_as_a_whole(pipeline: Any) -> bool:
    """Whether a cast to bfloat16 does not depend on the size that is set."""
    large, small = copy.deepcopy(pipeline), copy.deepcopy(pipeline)
    small.set_size(SIZES[0])
    return same(images_of(small.to(torch.bfloat16)), images_of(large.to(torch.bfloat16)))


def ways() -> list[str]:
    """The copies that this machine can make."""
    return [way for way in COPIES if way != "moved to the GPU and back" or torch.cuda.is_available()]


def report(denoiser: str, switches: int) -> list[tuple[str, str, bool]]:
    """What was done to a pipeline, what came of it, and whether that is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pipeline = make_pipeline(denoiser, place)
        soaked = soak(pipeline, switches)
        before, after = soaked.before, soaked.after
        grown = after.resident - before.resident
        of = f"of {before.resident / 2**20:.0f} MiB"
        rounds = max(10, switches // 50)
        rows = [
            (f"{soaked.images} images", f"{soaked.differing} differ", soaked.differing == 0),
            ("resident set", f"{grown / 2**20:+.2f} MiB {of}", grown <= MAX_GROWTH),
            (
                "live tensors",
                f"{after.tensors - before.tensors:+d} of {before.tensors}",
                after.tensors <= before.tensors,
            ),
            ("live objects", f"{after.objects - before.objects:+d} of {before.objects}", _flat(soaked)),
        ]
        checks = {
            f"two threads, {rounds} images each": sampled_in_threads(pipeline, rounds),
            **{way: is_faithful(pipeline, place, way) for way in ways()},
            "cast to bfloat16 at the smallest size, as at the largest": is_cast_as_a_whole(pipeline),
        }
    rows += [(what, "the same" if kept else "another", kept) for what, kept in checks.items()]
    return [(f"{denoiser}: {what}", figure, kept) for what, figure, kept in rows]


def _flat(soaked: Soaked) -> bool:
    """Whether fewer objects were added than one in ten changes of size."""
    return soaked.after.objects - soaked.before.objects < soaked.switches / 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=SWITCHES, help=f"changes of size (default: {SWITCHES})")
    args = parser.parse_args(argv)
    if args.switches < 100:
        parser.error(f"--switches is {args.switches}; it must be at least 100")
    print(f"torch {torch.__version__}, {args.switches} changes of size, process {os.getpid()}\n")
    print("| what | figure | |\n|---|---|---|")
    missed = 0
    for denoiser in DENOISERS:
        for what, figure, kept in report(denoiser, args.switches):
            missed += not kept
            print(f"| {what} | {figure} | {'kept' if kept else 'MISSED'} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

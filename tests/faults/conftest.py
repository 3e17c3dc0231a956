"""Tiny checkpoints, data and recordings to break, made once, and the process that others are forked from."""

import hashlib
import json
import os
import shutil
import string
import struct
import zlib

import pytest
import torch
from conftest import plain_unet
from diffusers import DDPMPipeline, DDPMScheduler
from faults.harness import finish
from faults.launches import pixels
from PIL import Image
from recipes.tiny_stable_diffusion import save_captioned_images
from tiny_stable_diffusion import save_stable_diffusion
from training.tiny_shards import save_shards

import ofadiff
from ofadiff import Supernet, allocate, find_channel_groups, score_channels

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = (0.6, 1.0)


def tiny_unet():
    torch.manual_seed(0)
    return plain_unet(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8).eval()


def supernet_of(model):
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    return Supernet(model, groups, scores, allocate(model, groups, scores, sizes=SIZES))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Folders that are as they should be: `original`, `checkpoint`, `size`, `text`, `images`, `captioned` and
    `recordings`, and files `prompts.txt` and `calls.jsonl`.
    """
    folder = tmp_path_factory.mktemp("whole")
    scheduler = DDPMScheduler(num_train_timesteps=50)
    pipeline = DDPMPipeline(tiny_unet(), scheduler)
    pipeline.save_pretrained(folder / "original")
    pipeline.set_progress_bar_config(disable=True)
    ofadiff.record(pipeline, [{"batch_size": 1, "num_inference_steps": 2}], folder / "recordings", steps_per_call=1)
    supernet = supernet_of(tiny_unet())
    DDPMPipeline(supernet.model, scheduler).save_pretrained(folder / "checkpoint")
    supernet.extract(0.6).save_pretrained(folder / "size")
    save_stable_diffusion(folder / "text")
    save_captioned_images(folder / "captioned")
    shutil.copytree(folder / "captioned", folder / "images", ignore=shutil.ignore_patterns("metadata.jsonl"))
    (folder / "prompts.txt").write_text("a b\nc\n")
    (folder / "calls.jsonl").write_text(json.dumps({"batch_size": 1, "num_inference_steps": 2}) + "\n")
    return folder


class Place:
    """A folder of one test, with copies of what it breaks.

    `place / "checkpoint"` is a copy; `place.fill("--x {images}")` puts paths of copies into a text.
    """

    def __init__(self, whole, folder):
        self.whole, self.folder = whole, folder

    def __truediv__(self, name):
        first = name.partition("/")[0]
        source, target = self.whole / first, self.folder / first
        if source.exists() and not target.exists():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return self.folder / name

    def fill(self, text):
        names = {field for _, field, _, _ in string.Formatter().parse(text) if field}
        return text.format(**{name: self / FILES.get(name, name) for name in names})

    def contents(self):
        """Every file with a digest of what is in it, links by where they lead; folders too."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_symlink():
                found[name] = str(path.readlink())
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        return found


FILES = {"prompts": "prompts.txt", "calls": "calls.jsonl"}


@pytest.fixture
def place(whole, tmp_path):
    return Place(whole, tmp_path)


# How files are broken. Each takes a place.


def edit(name, change):
    """A JSON file with its object changed in place, or replaced by what the change returns."""

    def broken(place):
        path = place / name
        values = json.loads(path.read_text())
        changed = change(values)
        path.write_text(json.dumps(values if changed is None else changed))

    return broken


def changed(name, **values):
    """A JSON file whose object has other values."""
    return edit(name, lambda before: before.update(values))


def pipe(name):
    """A named pipe, into which nobody writes, in place of a file."""

    def broken(place):
        path = place / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return broken


def write(name, content):
    """A file that holds something else."""

    def broken(place):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return broken


def cut(name, share=0.5):
    """A file that ends early."""

    def broken(place):
        path = place / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return broken


def flip(name, offset):
    """A file with one bit of one byte turned; a negative offset counts from its end."""

    def broken(place):
        path = place / name
        content = bytearray(path.read_bytes())
        content[offset] ^= 4
        path.write_bytes(content)

    return broken


def remove(name):
    def broken(place):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return broken


def all_of(*breaks):
    def broken(place):
        for each in breaks:
            each(place)

    return broken


def bomb(width=50_000, height=50_000):
    """A PNG of some bytes that claims more pixels than a memory has."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def png(folder, name="image.png"):
    path = folder / name
    Image.new("RGB", (8, 8)).save(path)
    return path


# Runs to kill.


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A pixel model and a text-to-image model, images, shards and calls."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    unet = plain_unet(sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "ddpm")
    save_stable_diffusion(folder / "sd")
    save_captioned_images(folder / "images")
    (folder / "images" / "metadata.jsonl").unlink()
    save_shards(folder / "shards", counts=(9, 7, 8))
    calls = [json.dumps({"batch_size": 1, "num_inference_steps": 3}) for _ in range(6)]
    (folder / "calls.jsonl").write_text("\n".join(calls))
    return folder


@pytest.fixture(scope="session")
def never_killed(nursery, originals, tmp_path_factory):
    """The output folder of a run in float32 that was never killed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    finish(nursery, pixels(originals), folder)
    return folder

"""What a user or a file can get wrong: one sentence that names it, and nothing is written.

A command ends with status 2; a function raises the type that its docstring names. Nothing anywhere in the test's folder
may have changed by then.
"""

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import plain_unet
from faults.conftest import WEIGHTS, all_of, bomb, changed, cut, edit, flip, pipe, png, remove, tiny_unet, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training.conftest import fresh_accelerate  # noqa: F401

import ofadiff
from ofadiff import (
    OFAPipeline,
    SizeSchedule,
    Supernet,
    allocate,
    correct_readers,
    evaluate,
    find_channel_groups,
    find_schedule,
    record,
    rotate_attention,
    score_channels,
)
from ofadiff.commands.app import COMMANDS as KNOWN
from ofadiff.commands.app import main
from ofadiff.data.images import check_images, image_folder
from ofadiff.data.latent_cache import LatentCache
from ofadiff.data.prompts import read_prompts
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.extraction import extracted_class
from ofadiff.pipelines.calls import read_calls, read_located_calls
from ofadiff.reading.tensors import read_metadata, read_tensors
from ofadiff.recordings import Recordings
from ofadiff.training.checkpoint import read_flags

pytestmark = pytest.mark.slow

COMPRESS = (
    "compress --pretrained_model_name_or_path {original} --train_data_dir {images} --output_dir {out} --sizes 0.6 1"
)
HEAL = "heal --pretrained_model_name_or_path {checkpoint} --train_data_dir {images} --output_dir {out} --size 0.6"
EXTRACT = "extract --checkpoint {checkpoint} --sizes 0.6 --output_dir {out}"
EVALUATE = "evaluate --checkpoint {checkpoint} --metrics macs --num_samples 4 --output_dir {out}"
RECORD = "record --pretrained_model_name_or_path {original} --calls_file {calls} --output_dir {out}"

CONFIG = "checkpoint/unet/ofa_config.json"
STORED = f"checkpoint/unet/{WEIGHTS}"
BASIS = "checkpoint/unet/ofa_basis.safetensors"
INDEX = "checkpoint/model_index.json"
DENOISER = "checkpoint/unet/config.json"
SCHEDULER = "checkpoint/scheduler/scheduler_config.json"
RECORDED = "recordings/recordings.json"
CALL = "recordings/calls/000000.safetensors"


@dataclass
class Case:
    """Something bad.

    Attributes:
        name: Of the test.
        does: Words of a command, or a function of a place.
        says: What the sentence has, in this order.
        breaks: What is done to the files before.
        raises: Of a function.
    """

    name: str
    does: Any
    says: tuple[str, ...]
    breaks: Any = None
    raises: Any = ValueError
    marks: tuple = field(default=())


def whole_checkpoint(place):
    return OFAPipeline.from_pretrained(place / "checkpoint")


def smallest(place):
    return OFAPipeline.from_pretrained(place / "checkpoint", size=0.6)


def all_recordings(place):
    return list(Recordings(place / "recordings"))


def subnets(change):
    return edit(CONFIG, lambda values: change(values["subnets"]))


def widths(*given):
    """Sizes that keep other numbers of units of the first group, in their order."""

    def change(values):
        for subnet, width in zip(values, given, strict=False):
            subnet["widths"][next(iter(subnet["widths"]))] = width

    return subnets(change)


def sharded(shard):
    """Weights in several files, one of which has this name."""
    return all_of(remove(STORED), write(f"{STORED}.index.json", json.dumps({"weight_map": {"conv_in.weight": shard}})))


def adapter(place, **changes):
    """A LoRA for the size 0.6."""
    folder = place / "checkpoint/unet/ofa_adapters/0.6"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 2} | changes.pop("config", {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"down_blocks.0.resnets.0.conv1.lora_A.weight": torch.zeros(2, 3), **changes}
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )


UP = "down_blocks.0.resnets.0.conv1.lora_B.weight"


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def huge_npz(place):
    """Statistics of some hundred bytes that claim two million features."""
    import io
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (2_000_000,) * 2})
    with zipfile.ZipFile(place / "real.npz", "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", head.getvalue())


COMMANDS = [
    Case("no command of that name", "compres --sizes 1", ("compres",)),
    Case("a flag that is none", f"{COMPRESS} --size 0.6", ("--size",)),
    Case("a flag twice missing", "compress --sizes 1", ("pretrained_model_name_or_path",)),
    Case("a config that is missing", "compress --config {nowhere}", ("--config", "nowhere", "no such file")),
    Case("a config that is no YAML", "compress --config {bad}", ("bad",), write("bad", "a: [")),
    Case("a config with numbers for flags", "compress --config {bad}", ("bad", "1", "no word"), write("bad", "1: 2")),
    Case(
        "a config that grows",
        "compress --config {bad}",
        ("bad", "sizes", "nested"),
        write("bad", "sizes: &a [1, 1]\noutput_dir: &b [*a, *a]\nsizes: [*b, *b]"),
    ),
    Case("no original", COMPRESS.replace("{original}", "{nowhere}"), ("cannot load", "nowhere")),
    Case("a file for the original", COMPRESS.replace("{original}", "{prompts}"), ("prompts.txt",)),
    Case(
        "an empty folder",
        COMPRESS.replace("{original}", "{empty}"),
        ("empty", "model_index.json"),
        lambda place: (place / "empty").mkdir(),
    ),
    Case("a checkpoint for an original", COMPRESS.replace("{original}", "{checkpoint}"), ("compressed already",)),
    Case("no images", COMPRESS.replace("{images}", "{nowhere}"), ("nowhere is not a folder of images",)),
    Case(
        "a folder without images",
        COMPRESS.replace("{images}", "{empty}"),
        ("empty holds no images",),
        lambda place: (place / "empty").mkdir(),
    ),
    Case("an output that is a file", COMPRESS.replace("{out}", "{prompts}"), ("--output_dir", "is a file")),
    Case("an output that is not empty", COMPRESS.replace("{out}", "{images}"), ("--output_dir", "is not empty")),
    Case(
        "the original's own folder", COMPRESS.replace("{out}", "{original}"), ("is the pretrained model's own folder",)
    ),
    Case("an output below a file", COMPRESS.replace("{out}", "{prompts}/a"), ("--output_dir", "prompts.txt is a file")),
    Case(
        "an output among the images", COMPRESS.replace("{out}", "{images}/new"), ("--output_dir", "images/new lies in")
    ),
    Case("an output in the original", COMPRESS.replace("{out}", "{original}/unet/a"), ("--output_dir", "lies in")),
    Case(
        "an output that leads to itself",
        COMPRESS,
        ("--output_dir", "a link that leads nowhere"),
        lambda place: (place / "out").symlink_to("out"),
    ),
    Case("a name that is too long", EXTRACT.replace("{out}", "a" * 300), ("--output_dir", "is too long", "255")),
    Case("a size of zero", COMPRESS.replace("0.6 1", "0"), ("'0'", "(0, 1]")),
    Case("a negative size", COMPRESS.replace("0.6 1", "-0.5"), ("-0.5",)),
    Case("a size above one", COMPRESS.replace("0.6 1", "60"), ("'60'", "(0, 1]")),
    Case("a size that is no number", COMPRESS.replace("0.6 1", "nan"), ("'nan'", "(0, 1]")),
    Case("an infinite size", COMPRESS.replace("0.6 1", "inf"), ("'inf'", "(0, 1]")),
    Case("a size twice", COMPRESS.replace("0.6 1", "0.6 0.6"), ("0.6",)),
    Case("half a batch", f"{COMPRESS} --train_batch_size 1.5", ("--train_batch_size", "'1.5'", "whole number")),
    Case("no batch", f"{COMPRESS} --train_batch_size 0", ("--train_batch_size", "'0'", "at least 1")),
    Case("a rate that is none", f"{COMPRESS} --learning_rate nan", ("--learning_rate", "nan")),
    Case("a rate below zero", f"{COMPRESS} --learning_rate -1e-4", ("--learning_rate",)),
    Case("an unknown budget", f"{COMPRESS} --budget flops", ("--budget", "flops", "params")),
    Case("an unknown criterion", f"{COMPRESS} --criterion best", ("--criterion", "best", "taylor")),
    Case("a share above one", f"{COMPRESS} --min_keep 1.5", ("min_keep", "1.5", "[0, 1]")),
    Case("an unknown tracker", f"{COMPRESS} --report_to abacus", ("--report_to abacus",)),
    Case("nothing to resume from", f"{COMPRESS} --resume_from_checkpoint checkpoint-7", ("checkpoint-7",)),
    Case("a broken image", COMPRESS, ("broken.png", "1 of"), write("images/broken.png", b"\x89PNG\r\n\x1a\n1234")),
    Case("an image of zero bytes", COMPRESS, ("zero.png", "1 of"), write("images/zero.png", b"")),
    Case("a page that is called an image", COMPRESS, ("page.jpg", "1 of"), write("images/page.jpg", "<html></html>")),
    Case("a decompression bomb", COMPRESS, ("2500000000 pixels", "bomb.png", "1 of"), write("images/bomb.png", bomb())),
    Case("an image that is a pipe", COMPRESS, ("pipe.png", "a pipe"), pipe("images/pipe.png")),
    Case("original: a pipe", COMPRESS, ("original/unet/notes", "a pipe"), pipe("original/unet/notes")),
    Case(
        "original: a link in a circle",
        COMPRESS,
        ("original/unet/again", "a link to the folder"),
        lambda place: (place / "original/unet/again").symlink_to(".."),
    ),
    Case("original: weights cut short", COMPRESS, (WEIGHTS, "cut short"), cut(f"original/unet/{WEIGHTS}")),
    Case(
        "original: a pointer of git-lfs",
        COMPRESS,
        (WEIGHTS, "git-lfs"),
        write(f"original/unet/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    Case(
        "original: a million channels",
        COMPRESS,
        ("config.json", "1000000", "in the weights"),
        changed("original/unet/config.json", block_out_channels=[1_000_000, 1_000_000]),
    ),
    Case(
        "original: a thousand million layers",
        COMPRESS,
        ("config.json", "modules"),
        changed("original/unet/config.json", layers_per_block=10**9),
    ),
    Case(
        "original: channels that are text",
        COMPRESS,
        ("config.json", "does not make a UNet2DModel"),
        changed("original/unet/config.json", block_out_channels="wide"),
    ),
    Case(
        "original: a config that is a list",
        COMPRESS,
        ("config.json", "must be an object"),
        edit("original/unet/config.json", lambda v: [v]),
    ),
    Case(
        "original: timesteps without end",
        COMPRESS,
        ("scheduler_config.json", "num_train_timesteps"),
        changed("original/scheduler/scheduler_config.json", num_train_timesteps=10**13),
    ),
    Case(
        "text: no captions",
        "compress --pretrained_model_name_or_path {text} --train_data_dir {images} --sizes 1 --output_dir {out}",
        ("no column 'text' of captions", "metadata.jsonl"),
    ),
    Case(
        "text: an image without a caption",
        "compress --pretrained_model_name_or_path {text} --sizes 1 --train_data_dir {captioned} --output_dir {out}",
        ("caption",),
        write("captioned/metadata.jsonl", '{"file_name": "other.png", "text": "a"}\n'),
    ),
    Case(
        "text: captions that are not JSON",
        "compress --pretrained_model_name_or_path {text} --sizes 1 --train_data_dir {captioned} --output_dir {out}",
        ("captioned",),
        write("captioned/metadata.jsonl", "{"),
    ),
    Case("heal: no such size", HEAL.replace("--size 0.6", "--size 0.5"), ("0.5", "0.6")),
    Case("heal: no checkpoint", HEAL.replace("{checkpoint}", "{original}"), ("original", "no OFA checkpoint")),
    Case("heal: a rank below one", f"{HEAL} --lora_rank 0", ("--lora_rank", "0")),
    Case("extract: no such size", EXTRACT.replace("0.6", "0.7"), ("0.7", "0.6")),
    Case("extract: an original", EXTRACT.replace("{checkpoint}", "{original}"), ("no OFA checkpoint",)),
    Case("extract: a folder that is there", EXTRACT, ("size-0.6 exists already",), write("out/size-0.6/a", "b")),
    Case("extract: an unknown dtype", f"{EXTRACT} --dtype float8", ("--dtype", "float8", "float16")),
    Case("extract: weights cut short", EXTRACT, (WEIGHTS, "cut short"), cut(STORED)),
    Case("extract: an empty file of weights", EXTRACT, (WEIGHTS, "it is empty"), write(STORED, b"")),
    Case("extract: a variant for many", f"{EXTRACT} --variant **", ("variant", "'**'", "plain word")),
    Case("extract: a variant elsewhere", f"{EXTRACT} --save_variant ../x", ("variant", "'../x'", "plain word")),
    Case("evaluate: no checkpoint", EVALUATE.replace("{checkpoint}", "{nowhere}"), ("nowhere",)),
    Case("evaluate: an unknown metric", EVALUATE.replace("macs", "beauty"), ("beauty", "macs")),
    Case("evaluate: no samples", EVALUATE.replace("--num_samples 4", "--num_samples 0"), ("--num_samples", "'0'")),
    Case("evaluate: an output in use", EVALUATE.replace("{out}", "{images}"), ("images",)),
    Case("evaluate: an unknown size", f"{EVALUATE} --sizes 0.1", ("0.1", "0.6")),
    Case("evaluate: a name that leads away", f"{EVALUATE} --compare ../../x={{original}}", ("'../../x'",)),
    Case("evaluate: statistics that are none", f"{EVALUATE} --reference_statistics {{prompts}}", ("prompts.txt",)),
    Case("record: no calls", RECORD.replace("{calls}", "{nowhere}"), ("nowhere is not a file of calls",)),
    Case("record: calls that are not JSON", RECORD, ("calls.jsonl, line 1", "not JSON"), write("calls.jsonl", "{")),
    Case(
        "record: no steps",
        RECORD,
        ("call 1", "num_inference_steps 0"),
        write("calls.jsonl", '{"num_inference_steps": 0}'),
    ),
    Case("record: an argument that is none", RECORD, ("call 1", "'size'"), write("calls.jsonl", '{"size": 1}')),
    Case(
        "record: a call that the pipeline stumbles over",
        RECORD,
        ("call 1", "DDPMPipeline", "negative"),
        write("calls.jsonl", '{"batch_size": -1}'),
    ),
    Case("record: calls nested deeply", RECORD, ("calls.jsonl, line 1", "nested"), write("calls.jsonl", "[" * 10**5)),
    Case("record: an output of something else", RECORD.replace("{out}", "{images}"), ("images",)),
    Case("app: no checkpoint", "app {original}", ("no OFA checkpoint",), marks=("gradio",)),
    Case("app: a port that is none", "app {checkpoint} --port 70000", ("port", "70000", "65535")),
    Case(
        "architectures: an output that is a folder",
        "architectures --output {images}",
        ("--output", "images is a folder"),
    ),
]

FILES = [
    Case(
        "JSON that is nested too deeply",
        whole_checkpoint,
        (DENOISER, "more than 100 levels"),
        edit(DENOISER, lambda v: v | {"a": json.loads("[" * 500 + "]" * 500)}),
    ),
    Case("a number without end", smallest, (CONFIG, "401 digits"), changed(CONFIG, min_keep=10**400)),
    Case("a recording that is a pipe", all_recordings, (CALL, "a pipe"), pipe(CALL)),
    Case(
        "a scheduler that is none", whole_checkpoint, (SCHEDULER, "DDPMScheduler"), changed(SCHEDULER, beta_start="x")
    ),
    Case("a scheduler's endless list", whole_checkpoint, ("solver_order",), changed(SCHEDULER, solver_order=10**9)),
    Case(
        "quantized by a number",
        whole_checkpoint,
        (DENOISER, "quantization_config 3"),
        changed(DENOISER, quantization_config=3),
    ),
    Case("a component without a class", whole_checkpoint, ("'diffusers', ''",), changed(INDEX, unet=["diffusers", ""])),
    Case(
        "a component that is a module",
        whole_checkpoint,
        ("no class",),
        changed(INDEX, scheduler=["diffusers", "utils"]),
    ),
    Case(
        "a pipeline in itself",
        whole_checkpoint,
        ("for its again",),
        changed(INDEX, again=["diffusers", "DDPMPipeline"]),
    ),
    Case(
        "a run's state of other types",
        lambda p: read_flags(p / "run"),
        ("state.json", "flags 3", "an object"),
        write("run/state.json", '{"flags": 3}'),
    ),
    Case("half a character", lambda p: read_prompts(p / "a.json"), ("a.json", "half"), write("a.json", '["\\ud800"]')),
    Case(
        "a cell without end", lambda p: read_calls(p / "a.csv"), ("a.csv, line 2",), write("a.csv", "a\n" + "b" * 10**6)
    ),
    Case("no JSON", whole_checkpoint, ("ofa_config.json", "not JSON"), write(CONFIG, "{")),
    Case("JSON without end", whole_checkpoint, ("ofa_config.json", "nested too deeply"), write(CONFIG, "[" * 200_000)),
    Case("a list", whole_checkpoint, ("ofa_config.json", "must be an object"), write(CONFIG, "[]")),
    Case("bytes", whole_checkpoint, ("ofa_config.json", "not JSON"), write(CONFIG, b"\xff\xfe\x00")),
    Case(
        "another format",
        whole_checkpoint,
        ("format_version 2", "reads 1"),
        changed(CONFIG, format_version=2),
    ),
    Case(
        "no subnets",
        whole_checkpoint,
        ("ofa_config.json", "'subnets'"),
        edit(CONFIG, lambda v: {**v, "subnets": []} and {key: value for key, value in v.items() if key != "subnets"}),
    ),
    Case("an empty list of subnets", whole_checkpoint, ("no subnets",), changed(CONFIG, subnets=[])),
    Case(
        "a subnet that is text",
        whole_checkpoint,
        ("subnet 1", "must be an object"),
        subnets(lambda s: s.__setitem__(0, "x")),
    ),
    Case("sizes out of order", whole_checkpoint, ("1 before 0.6", "ascend"), subnets(lambda s: s.reverse())),
    Case("a size twice", whole_checkpoint, ("must ascend",), subnets(lambda s: s[0].update(size=1.0))),
    Case("a negative size", smallest, ("size -0.6", "(0, 1]"), subnets(lambda s: s[0].update(size=-0.6))),
    Case("a negative width", smallest, ("the width -1",), widths(-1)),
    Case(
        "a huge width",
        smallest,
        ("the width 1000000000000",),
        widths(10**12),
    ),
    Case(
        "a width that is no number",
        smallest,
        ("the width '4'",),
        widths("4"),
    ),
    Case(
        "widths that do not nest",
        whole_checkpoint,
        ("must nest",),
        widths(2, 1),
    ),
    Case(
        "an unknown group",
        whole_checkpoint,
        ("other groups", "'attic'"),
        subnets(lambda s: s[0]["widths"].update(attic=1)),
    ),
    Case(
        "widths that were changed",
        smallest,
        ("was changed since it was written",),
        widths(1, 1),
    ),
    Case("an unknown key of a subnet", whole_checkpoint, ("'colour'",), subnets(lambda s: s[0].update(colour=1))),
    Case(
        "a budget that is none",
        whole_checkpoint,
        ("the budget 'flops'",),
        changed(CONFIG, budget="flops"),
    ),
    Case("parameters below zero", whole_checkpoint, ("full_params -1",), changed(CONFIG, full_params=-1)),
    Case(
        "a schedule that is none",
        whole_checkpoint,
        ("a schedule is 3",),
        changed(CONFIG, schedules={"a": 3}),
    ),
    Case(
        "a schedule of other sizes",
        whole_checkpoint,
        ("0.3",),
        changed(CONFIG, schedules={"a": {"sizes": [0.3]}}),
    ),
    Case(
        "groups of another model",
        whole_checkpoint,
        ("other channel groups",),
        edit(CONFIG, lambda v: v["groups"][0].update(stage="attic")),
    ),
    Case("a basis with one bit turned", smallest, ("ofa_basis.safetensors", "changed"), flip(BASIS, -1)),
    Case("a basis that is cut short", smallest, ("ofa_basis.safetensors", "cut short"), cut(BASIS)),
    Case("a header with one bit turned", smallest, (WEIGHTS,), flip(STORED, 10)),
    Case("a header that claims an exabyte", smallest, (WEIGHTS,), write(STORED, struct.pack("<Q", 2**60) + b"{}")),
    Case(
        "a tensor that claims a terabyte",
        smallest,
        (WEIGHTS,),
        write(STORED, header(a={"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]})),
    ),
    Case("a web page for weights", smallest, (WEIGHTS, "web page"), write(STORED, "<!doctype html>")),
    Case("weights that are a folder", smallest, ("unet",), all_of(remove(STORED), lambda p: (p / STORED).mkdir())),
    Case(
        "a shard elsewhere",
        smallest,
        ("../../images", "plain name"),
        sharded("../../images/0.safetensors"),
    ),
    Case(
        "a shard at an absolute path",
        whole_checkpoint,
        ("'/etc/passwd'",),
        sharded("/etc/passwd"),
    ),
    Case(
        "a shard that is missing",
        whole_checkpoint,
        ("names 1.safetensors, which is not there",),
        sharded("1.safetensors"),
        (FileNotFoundError, ValueError),
    ),
    Case(
        "an index without a map",
        whole_checkpoint,
        ("weight_map",),
        all_of(remove(STORED), write(f"{STORED}.index.json", "{}")),
    ),
    Case("no config of the denoiser", whole_checkpoint, ("config.json",), remove(DENOISER)),
    Case(
        "a denoiser's class that is none",
        whole_checkpoint,
        ("'Nothing'",),
        changed(DENOISER, _class_name="Nothing"),
    ),
    Case("an index that is a list", whole_checkpoint, ("model_index.json",), write(INDEX, "[]")),
    Case(
        "an index without a class",
        whole_checkpoint,
        ("model_index.json", "_class_name"),
        edit(INDEX, lambda v: {"unet": v["unet"]}),
    ),
    Case(
        "a component's name that leads away",
        whole_checkpoint,
        ("'../x'", "plain word"),
        changed(INDEX, **{"../x": ["diffusers", "UNet2DModel"]}),
    ),
    Case(
        "a pipeline's class that is none",
        whole_checkpoint,
        ("'NoPipeline'",),
        changed(INDEX, _class_name="NoPipeline"),
    ),
    Case("an adapter without its other half", smallest, ("rank",), adapter),
    Case(
        "an adapter of other shapes",
        smallest,
        ("conv1", "whose weight is"),
        lambda p: adapter(p, **{UP: torch.zeros(5, 2)}),
    ),
    Case(
        "an adapter without alpha",
        whole_checkpoint,
        ("lora_alpha None",),
        lambda p: adapter(p, config={"lora_alpha": None}, **{UP: torch.zeros(5, 2)}),
    ),
    Case(
        "an adapter that is cut short",
        smallest,
        ("adapter_model.safetensors", "cut short"),
        all_of(
            lambda p: adapter(p, **{UP: torch.zeros(5, 2)}),
            cut("checkpoint/unet/ofa_adapters/0.6/adapter_model.safetensors"),
        ),
    ),
    Case("an adapter of another size", whole_checkpoint, ("0.3",), write("checkpoint/unet/ofa_adapters/0.3/a", "b")),
    Case(
        "an extracted model's widths are huge",
        lambda p: extracted_class(type(tiny_unet())).from_pretrained(p / "size"),
        ("config.json", "between"),
        edit("size/config.json", lambda v: v["ofa_widths"].update({next(iter(v["ofa_widths"])): 10**9})),
    ),
    Case(
        "an extracted model's widths are text",
        lambda p: extracted_class(type(tiny_unet())).from_pretrained(p / "size"),
        ("ofa_widths",),
        changed("size/config.json", ofa_widths="all"),
    ),
    Case("recordings: nothing", lambda p: Recordings(p / "images"), ("recordings.json",)),
    Case(
        "recordings: no JSON",
        lambda p: Recordings(p / "recordings"),
        ("not JSON",),
        write(RECORDED, "{"),
    ),
    Case(
        "recordings: other types",
        lambda p: Recordings(p / "recordings"),
        ("the calls 3", "a list"),
        changed(RECORDED, calls=3),
    ),
    Case("recordings: cut short", lambda p: Recordings(p / "recordings"), (CALL, "damaged"), cut(CALL)),
    Case(
        "recordings: one bit turned",
        all_recordings,
        (CALL, "not what was recorded"),
        flip(CALL, -1),
    ),
    Case(
        "recordings: a header that claims an exabyte",
        lambda p: Recordings(p / "recordings"),
        (CALL, "damaged"),
        write(CALL, struct.pack("<Q", 2**60) + b"{}"),
    ),
    Case(
        "recordings: a file that says nothing",
        lambda p: Recordings(p / "recordings"),
        (CALL, "damaged"),
        lambda p: save_file({"a": torch.zeros(1)}, p / CALL),
    ),
    Case("a cache that is none", lambda p: LatentCache(p / "images", {}), ("no folder of cached latents",)),
    Case(
        "a cache that is no JSON",
        lambda p: LatentCache(p / "images", {}),
        ("latents.json", "not JSON"),
        write("images/latents.json", "{"),
    ),
    Case(
        "statistics that are a bomb", lambda p: FeatureStatistics.load(p / "real.npz"), ("real.npz", "claims"), huge_npz
    ),
    Case(
        "statistics that are a pickle",
        lambda p: FeatureStatistics.load(p / "real.npz"),
        ("real.npz",),
        lambda p: np.savez(p / "real.npz", mu=np.array([{}]), sigma=np.array([{}])),
    ),
    Case(
        "statistics cut short",
        lambda p: FeatureStatistics.load(p / "real.safetensors"),
        ("real.safetensors", "cut short"),
        write("real.safetensors", header(mean={"dtype": "F64", "shape": [9], "data_offsets": [0, 72]})),
    ),
    Case(
        "prompts in bytes",
        lambda p: read_prompts(p / "prompts.txt"),
        ("prompts.txt", "zero bytes"),
        write("prompts.txt", b"a\0"),
    ),
    Case("no prompts", lambda p: read_prompts(p / "prompts.txt"), ("no prompts",), write("prompts.txt", "\n\n")),
    Case(
        "calls in a number", lambda p: read_calls(p / "calls.json"), ("calls.json", "a list"), write("calls.json", "3")
    ),
    Case(
        "a call's image that is a bomb",
        lambda p: read_located_calls(p / "calls.jsonl"),
        ("bomb.png", "pixels"),
        all_of(write("bomb.png", bomb()), write("calls.jsonl", '{"image": "bomb.png"}')),
    ),
    Case(
        "a call's image that is missing",
        lambda p: read_located_calls(p / "calls.jsonl"),
        ("gone.png is no file",),
        write("calls.jsonl", '{"image": "gone.png"}'),
    ),
    Case(
        "an image of no pixels",
        lambda p: check_images(image_folder(p / "images")),
        ("flat.png",),
        write("images/flat.png", bomb(0, 5)),
    ),
    Case(
        "an image that ends early",
        lambda p: check_images(image_folder(p / "images")),
        ("short.png",),
        all_of(lambda p: png(p / "images", "short.png"), cut("images/short.png", 0.6)),
    ),
]


def parts():
    model = tiny_unet()
    groups = find_channel_groups(model)
    return model, groups, score_channels(model, groups, criterion="random")


def allocated(**changes):
    def run(place):
        model, groups, scores = parts()
        allocate(model, groups, scores, **{"sizes": (0.6, 1.0), **changes})

    return run


def scored(change):
    def run(place):
        model, groups, scores = parts()
        scores = change(groups, dict(scores))
        allocate(model, groups, scores, sizes=(0.6, 1.0))

    return run


def sampled(**changes):
    return lambda place: whole_checkpoint(place)(num_inference_steps=1, **changes)


def looked_for(**changes):
    options = {"budget": 0.7, "num_inference_steps": 2, **changes}
    return lambda place: find_schedule(whole_checkpoint(place), [{"batch_size": 1}], **options)


def recorded(calls, **options):
    return lambda place: record(whole_checkpoint(place), calls, place / "out", **options)


def supernet(place):
    return Supernet.from_pretrained(place / "checkpoint/unet")


def smaller(place):
    _, groups, scores = parts()
    narrow = plain_unet(sample_size=8, block_out_channels=(8, 16), norm_num_groups=8, attention_head_dim=8)
    allocate(narrow, groups, scores, sizes=(1.0,))


def loss(model, batch):
    return model(**batch).sample.square().flatten(1).mean(1)


PUBLIC = [
    Case("from_pretrained: nowhere", lambda p: OFAPipeline.from_pretrained(p / "nowhere"), ("nowhere",)),
    Case(
        "from_pretrained: a size that is none",
        lambda p: OFAPipeline.from_pretrained(p / "checkpoint", size=0.7),
        ("0.7", "0.6"),
    ),
    Case(
        "from_pretrained: a size that is no number",
        lambda p: OFAPipeline.from_pretrained(p / "checkpoint", size=float("nan")),
        ("nan",),
    ),
    Case(
        "from_pretrained: pickles",
        lambda p: OFAPipeline.from_pretrained(p / "checkpoint", use_safetensors=False),
        ("use_safetensors",),
    ),
    Case("call: a size that is none", sampled(size=2.0), ("2.0", "0.6")),
    Case("call: a schedule that is none", sampled(size="quick"), ("quick",)),
    Case("SizeSchedule: empty", lambda p: SizeSchedule([]), ("empty",)),
    Case("SizeSchedule: no number", lambda p: SizeSchedule([float("nan")]), ("nan",)),
    Case("SizeSchedule: too large", lambda p: SizeSchedule([10**400]), ("1000",)),
    Case("SizeSchedule: text", lambda p: SizeSchedule(["0.6"]), ("'0.6'",)),
    Case("Supernet: nowhere", lambda p: Supernet.from_pretrained(p / "nowhere"), ("nowhere", "ofa_config.json")),
    Case("Supernet: a size that is none", lambda p: supernet(p).set_size(0.1), ("0.1", "0.6")),
    Case(
        "Supernet: saved to a file",
        lambda p: supernet(p).save_pretrained(p / "prompts.txt"),
        ("prompts.txt", "is a file"),
    ),
    Case("find_channel_groups: no denoiser", lambda p: find_channel_groups(torch.nn.Linear(2, 2)), ("Linear",)),
    Case(
        "rotate_attention: another model's groups",
        lambda p: rotate_attention(torch.nn.Linear(2, 2), parts()[1]),
        ("Linear does not have",),
    ),
    Case(
        "score_channels: another model's groups",
        lambda p: score_channels(torch.nn.Linear(2, 2), parts()[1]),
        ("Linear",),
    ),
    Case("Supernet: a smaller model's weights", smaller, ("entries of",)),
    Case(
        "score_channels: an unknown criterion",
        lambda p: score_channels(*parts()[:2], criterion="best"),
        ("best", "taylor"),
    ),
    Case("score_channels: no batches", lambda p: score_channels(*parts()[:2], [], loss), ("batch",)),
    Case("allocate: no sizes", allocated(sizes=()), ("size",)),
    Case("allocate: a size of nothing", allocated(sizes=(0.0,)), ("0",)),
    Case("allocate: a size that is no number", allocated(sizes=(float("nan"),)), ("nan",)),
    Case("allocate: a size twice", allocated(sizes=(0.6, 0.6)), ("0.6",)),
    Case("allocate: a size below the floor", allocated(sizes=(0.001,)), ("0.001",)),
    Case("allocate: an unknown budget", allocated(budget="flops"), ("flops", "params")),
    Case("allocate: a share below zero", allocated(min_keep=-0.1), ("-0.1",)),
    Case("allocate: a share that is no number", allocated(min_keep=float("nan")), ("nan",)),
    Case("allocate: scores of one group alone", scored(lambda g, s: {g[0].name: s[g[0].name]}), ("scores lack",)),
    Case("allocate: scores of other shapes", scored(lambda g, s: s | {g[0].name: torch.ones(3)}), ("(3,)",)),
    Case("allocate: infinite scores", scored(lambda g, s: s | {g[0].name: s[g[0].name] * torch.inf}), ("finite",)),
    Case("correct_readers: no batches", lambda p: correct_readers(supernet(p), [], loss), ("batch",)),
    Case("evaluate: an unknown metric", lambda p: evaluate(whole_checkpoint(p), metrics=("beauty",)), ("beauty",)),
    Case("record: no calls", recorded([]), ("no call",)),
    Case("record: one prompt for a list", recorded("a cat"), ("str", "a list")),
    Case("record: an argument that is none", recorded([{"size": 1, "style": 2}]), ("call 1",)),
    Case("record: no steps", recorded([{"batch_size": 1}], steps_per_call=0), ("steps_per_call", "0")),
    Case("find_schedule: a budget that is no number", looked_for(budget=float("nan")), ("nan",)),
    Case("find_schedule: a budget of nothing", looked_for(budget=0.0), ("0",)),
    Case("find_schedule: no steps", looked_for(num_inference_steps=0), ("num_inference_steps is 0",)),
]


def test_there_are_enough():
    assert len(COMMANDS) + len(FILES) + len(PUBLIC) >= 60


def in_order(words, text):
    return re.search(".*".join(map(re.escape, words)), text, re.DOTALL)


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.name)
def test_a_command_says_what_is_wrong_in_one_line(case, place, capsys, monkeypatch):
    for module in case.marks:
        pytest.importorskip(module, reason=f"{module} is not installed")
    words = place.fill(case.does).split()
    if case.breaks is not None:
        case.breaks(place)
    before = place.contents()
    monkeypatch.chdir(place.folder)
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("ofadiff: error: ")]
    assert len(lines) == 1 and said.endswith(f"{lines[0]}\n")
    assert in_order(case.says, lines[0]), lines[0]
    assert place.contents() == before


@pytest.mark.parametrize("case", FILES + PUBLIC, ids=lambda case: case.name)
def test_a_function_says_what_is_wrong(case, place, monkeypatch):
    for name in ("checkpoint", "images", "prompts.txt", "recordings"):
        _ = place / name
    if case.breaks is not None:
        case.breaks(place)
    before = place.contents()
    monkeypatch.chdir(place.folder)
    with pytest.raises(case.raises) as failed:
        case.does(place)
    assert in_order(case.says, str(failed.value)), str(failed.value)
    assert place.contents() == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FEW = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def spots(value, path=()):
    """Where the values of a JSON value are."""
    found = [path] if path else []
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += spots(entry, (*path, key))
    return found


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


# Files of JSON, and what reads them.
JSON_FILES = {CONFIG: smallest, DENOISER: whole_checkpoint, INDEX: whole_checkpoint, RECORDED: all_recordings}


@pytest.mark.parametrize("name", JSON_FILES)
@FEW
@given(data=st.data())
def test_json_with_anything_anywhere_is_read_or_one_sentence(name, data, place):
    path = place / name
    kept = path.read_text()
    values = json.loads(kept)
    put(values, data.draw(st.sampled_from(spots(values))), data.draw(JSON))
    try:
        path.write_text(json.dumps(values))
        try:
            JSON_FILES[name](place)
        except (ImportError, OSError, ValueError) as error:
            assert str(error)
    finally:
        path.write_text(kept)


@FEW
@given(data=st.data())
def test_a_recording_with_anything_anywhere_is_read_or_one_sentence(data, place):
    path = place / CALL
    kept = path.read_bytes()
    tensors, contents = load_file(path), json.loads(read_metadata(path)["ofa_recording"])
    put(contents, data.draw(st.sampled_from(spots(contents))), data.draw(JSON))
    try:
        save_file(tensors, path, {"ofa_recording": json.dumps(contents)})
        try:
            all_recordings(place)
        except ValueError as error:
            assert str(error)
    finally:
        path.write_bytes(kept)


@FEW
@given(content=st.binary(max_size=300), size=st.integers(0, 2**64 - 1))
def test_any_bytes_for_tensors_are_one_sentence(content, size, place):
    path = place / "any.safetensors"
    path.write_bytes(struct.pack("<Q", size) + content)
    with pytest.raises(ValueError, match=r"any\.safetensors cannot be read"):
        read_tensors(path)


def test_every_command_and_every_public_name_is_in_the_tables():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name} ' in text for name in KNOWN)
    assert all(f"{name}(" in text or f"{name}." in text for name in ofadiff.__all__)

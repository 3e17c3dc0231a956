"""What sampling and joint training of UNets hold in memory, computed from shapes: no weights and no GPU are needed.

    python benchmarks/memory.py

First a small UNet: what is computed, beside what a forward and a training step take on this CPU. Then the UNets of
Stable Diffusion 1.5 and SDXL, whose tensors are fake: they have shapes and no content.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from denoisers import SHAPES, UNEVENNESS
from diffusers import UNet2DConditionModel
from recording_sizes import Ledger, Row, checkpointed, shown, storage_of
from side_by_side import Comparison
from torch import nn
from torch._subclasses import FakeTensorMode

from ofadiff import allocate, find_channel_groups, score_channels
from ofadiff.channels import ChannelGroup
from ofadiff.commands.command import main, script
from ofadiff.cutting import shrink_model
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.extraction.reader import default_dtype
from ofadiff.profiling import measure_peak_memory
from ofadiff.runs.settings import OPTIMIZERS
from ofadiff.sizes import SizeTable
from ofadiff.training.muon import split_weights
from ofadiff.values import Bundle, Range, one_of

SIZES = (0.4, 0.6, 0.8, 1.0)
# Of sampling, and of the forwards and the teacher of training.
DTYPE = torch.bfloat16
# What no way of counting from outside sees: buffers that kernels have for themselves, a larger part of a small model's.
KERNELS = 0.1
# Guidance calls the denoiser with two images for one.
SAMPLED = 2

SMALL = {**SHAPES["quick"], "block_out_channels": (64, 128), "sample_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "sd15": SHAPES["cuda"],
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TITLES = {"sd15": "Stable Diffusion 1.5, 512 pixels", "sdxl": "SDXL, 1024 pixels"}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Which(Bundle):
    """Which tables are printed."""

    models: Annotated[tuple[str, ...], one_of(MODELS)] = tuple(MODELS)
    """sd15, sdxl, or both"""
    images: Annotated[tuple[int, ...], Parameter(validator=Range(1, what="whole number"))] = (1,)
    """of a device in a step; a row for each number"""


def compare(*, which: Which = Which()) -> int:
    """Print the tables; the exit status is 1 if what is computed is not what was measured."""
    rows = small_rows()
    print("A small UNet, peaks beside the weights:\n")
    print("| quantity | computed | measured | ratio | bound |\n|---|---|---|---|---|", *rows, sep="\n")
    for name in which.models:
        config = MODELS[name]
        print(
            f"\n{TITLES[name]}: sampling one image in bfloat16\n\n{SIZES_HEAD}",
            *size_rows(config),
            sep="\n",
            flush=True,
        )
        print(f"\n{TITLES[name]}: a joint step\n\n{STEP_HEAD}", *step_rows(config, which.images), sep="\n", flush=True)
    return int(not all(row.met for row in rows))


SIZES_HEAD = "| size | parameters | MACs | weights | a forward, at most | both |\n|---|---|---|---|---|---|"
STEP_HEAD = "| weights | their average (EMA) | the teacher | Muon keeps | AdamW keeps |\n|---|---|---|---|---|"
PEAKS_HEAD = (
    "| images | gradient checkpointing | forward and backward, gradients too | in all, Muon | in all, AdamW |\n"
    "|---|---|---|---|---|"
)


def subnets_of(config: Mapping[str, Any], min_keep: float = 0.25) -> tuple[list[ChannelGroup], SizeTable]:
    """Groups and sizes of a UNet without weights, with scores as uneven as those of small trained models."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    groups = find_channel_groups(model)
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: score * math.exp(UNEVENNESS * torch.randn((), generator=generator).item())
        for name, score in score_channels(model, groups, criterion="random").items()
    }
    return groups, allocate(model, groups, scores, SIZES, min_keep=min_keep)


def make_unet(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet with random weights, or fake ones."""
    with default_dtype(dtype):
        return UNet2DConditionModel(**config).eval()


def cut(
    config: Mapping[str, Any], groups: Sequence[ChannelGroup], widths: dict[str, int], dtype: torch.dtype
) -> UNet2DConditionModel:
    """A UNet of one size."""
    model = make_unet(config, dtype)
    shrink_model(model, groups, widths)
    return model


def bytes_of(model: nn.Module) -> int:
    """Of the parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def beside(*models: nn.Module) -> Ledger:
    """Counts what is made beside the weights of some models."""
    ledger = Ledger(models[0])
    ledger.weights |= {storage_of(parameter) for model in models for parameter in model.parameters()}
    return ledger


@torch.no_grad()
def sampling_peak(model: UNet2DConditionModel) -> int:
    """The most that a forward holds beside the weights."""
    inputs = example_inputs(model, SAMPLED)
    with beside(model) as ledger:
        model(**inputs)
    return ledger.most


def step_of(model: UNet2DConditionModel, teacher: UNet2DConditionModel, inputs: Mapping[str, Any]) -> None:
    """Forward and backward of a joint step, the teacher's forward between them; gradients stay."""
    with torch.autocast("cpu", DTYPE):
        prediction = model(**inputs).sample
        with torch.no_grad():
            expected = teacher(**inputs).sample
    (prediction.float() - expected.float()).square().mean().backward()


def training_peak(model: UNet2DConditionModel, teacher: UNet2DConditionModel, images: int = 1) -> int:
    """The most that forward and backward hold beside the weights of both, gradients included."""
    inputs = example_inputs(model, images)
    with beside(model, teacher) as ledger:
        step_of(model, teacher, inputs)
    model.zero_grad()
    return ledger.most


def moments(model: UNet2DConditionModel, groups: Sequence[ChannelGroup], optimizer: str) -> tuple[int, int]:
    """What an optimizer keeps, and what its step holds beside that and the gradients, as on GPUs.

    Muon keeps one number for a weight of a matrix and takes matrix by matrix; AdamW keeps two, and takes all at once.
    """
    matrices, others = (sum(weight.nbytes for weight in each.values()) for each in split_weights(model, groups))
    if optimizer == "adamw":
        matrices, others = 0, matrices + others
    return matrices + 2 * others, others


def size_rows(config: Mapping[str, Any]) -> list[str]:
    """What every size's weights take, and a forward beside them."""
    groups, subnets = subnets_of(config)
    rows = []
    for subnet in reversed(subnets):
        with FakeTensorMode():
            model = cut(config, groups, subnet.widths, DTYPE)
            weights, most = bytes_of(model), sampling_peak(model)
        costs = f"{subnet.params / 1e6:,.0f} M | {(subnet.macs or 0) / 1e9:,.0f} G"
        rows.append(f"| {subnet.size:g} | {costs} | {shown(weights)} | {shown(most)} | {shown(weights + most)} |")
    return rows


def step_rows(config: Mapping[str, Any], images: Sequence[int]) -> list[str]:
    """What a run keeps from step to step, and what a step holds in all."""
    groups, _ = subnets_of(config)
    with FakeTensorMode():
        model, teacher = make_unet(config).train(), make_unet(config, DTYPE)
        weights, taught = bytes_of(model), bytes_of(teacher)
        held = [moments(model, groups, optimizer) for optimizer in OPTIMIZERS]
        rows = [f"| {cells([weights, weights, taught, *(state for state, _ in held)])} |", "", PEAKS_HEAD]
        for count in images:
            for checkpointing in (False, True):
                with checkpointed(model, checkpointing):
                    peak = training_peak(model, teacher, count)
                totals = [2 * weights + taught + state + max(peak, weights + most) for state, most in held]
                rows.append(f"| {count} | {'yes' if checkpointing else 'no'} | {cells([peak, *totals])} |")
    return rows


def cells(sizes: Sequence[float]) -> str:
    """Of a row of a table."""
    return " | ".join(map(shown, sizes))


def small_rows() -> list[Row]:
    """Computed and measured peaks of a small UNet on the CPU."""
    groups, subnets = subnets_of(SMALL)
    rows = []
    for subnet in (subnets[0], subnets[-1]):
        with FakeTensorMode():
            computed = sampling_peak(cut(SMALL, groups, subnet.widths, torch.float32))
        model = cut(SMALL, groups, subnet.widths, torch.float32)
        inputs = example_inputs(model, SAMPLED)
        held = bytes_of(model) + sum(each.nbytes for each in inputs.values())
        rows.append(Row(f"a forward at {subnet.size:g}", computed, measure_peak_memory(model, inputs) - held, KERNELS))
    for checkpointing in (False, True):
        with FakeTensorMode():
            model, teacher = make_unet(SMALL).train(), make_unet(SMALL, DTYPE)
            with checkpointed(model, checkpointing):
                computed = training_peak(model, teacher)
        model, teacher = make_unet(SMALL).train(), make_unet(SMALL, DTYPE)
        with checkpointed(model, checkpointing):
            found = measured_step(model, teacher)
        way = ", gradient checkpointing" if checkpointing else ""
        rows.append(Row(f"forward and backward{way}", computed, found, KERNELS))
    return rows


def measured_step(model: UNet2DConditionModel, teacher: UNet2DConditionModel) -> int:
    """As `training_peak`, measured on the CPU."""
    inputs = example_inputs(model, 1)

    def step() -> None:
        step_of(model, teacher, inputs)
        model.zero_grad()

    comparison = Comparison(torch.device("cpu"), quick=True, rounds=1)
    return comparison.peak_memory([model, teacher], step) - bytes_of(model) - bytes_of(teacher)


if __name__ == "__main__":
    sys.exit(main(script(compare, __file__)))

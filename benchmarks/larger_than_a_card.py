"""What each device holds in each phase of a run under FSDP, computed from shapes: no weights and no GPU are needed.

    python benchmarks/larger_than_a_card.py --devices 8

Of FLUX.1-dev and SDXL, in mixed precision bf16, without activations: benchmarks/memory.py and
benchmarks/recording_sizes.py compute those.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from cyclopts import Parameter
from diffusers import FluxTransformer2DModel, ModelMixin, UNet2DConditionModel
from memory import MODELS
from recording_sizes import FLUX, shown
from torch import nn

from ofadiff import find_channel_groups
from ofadiff.commands.command import main, script
from ofadiff.correction.readers import find_readers
from ofadiff.values import Bundle, Range

FLOAT32, BFLOAT16, FLOAT64 = 4, 2, 8
# Of FSDP's units: the one that computes, and the buffer in which the next one is put together.
UNITS = 2
# Two for the samples that choose the ridge and the others, as `correct_readers` keeps them.
SUMS = 2


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Devices(Bundle):
    """What a model is split over."""

    devices: Annotated[int, Parameter(validator=Range(1, what="whole number"))] = 8
    """number of devices, a process each"""


@dataclass(frozen=True)
class Numbers:
    """Numbers of weights.

    Attributes:
        all: Of the model.
        unit: Of the largest that FSDP puts together at once.
        layer: Of the largest module that holds weights itself.
        tensor: Of the largest tensor.
        sums: Numbers in the sums of the largest reader that is corrected.
    """

    all: int
    unit: int
    layer: int
    tensor: int
    sums: int


def numbers_of(model: ModelMixin) -> Numbers:
    """Counts the weights of a model, split where diffusers says that it should be."""
    classes = set(model._no_split_modules)
    units = {name for name, module in model.named_modules() if type(module).__name__ in classes} | {""}
    in_unit = dict.fromkeys(units, 0)
    for name, weight in model.named_parameters():
        parts = name.split(".")
        holder = next(path for end in range(len(parts), -1, -1) if (path := ".".join(parts[:end])) in units)
        in_unit[holder] += weight.numel()
    layers = [sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()]
    readers = [model.get_submodule(name) for name in find_readers(find_channel_groups(model))]
    return Numbers(
        sum(weight.numel() for weight in model.parameters()),
        max(in_unit.values()),
        max(layers),
        max(weight.numel() for weight in model.parameters()),
        max(SUMS * sums_of(reader) for reader in readers),
    )


def sums_of(reader: nn.Module) -> int:
    """Of one set of normal equations: columns times columns, and times outputs."""
    columns = reader.weight[0].numel() + (reader.bias is not None)
    return columns * (columns + len(reader.weight))


def phases(numbers: Numbers, devices: int) -> Mapping[str, tuple[float, float]]:
    """Bytes on a device in each phase: in one piece, and split."""
    weights, teacher = FLOAT32 * numbers.all, BFLOAT16 * numbers.all
    kept = weights + teacher + 3 * weights  # with the average and two moments
    unit = UNITS * BFLOAT16 * numbers.unit
    sums = FLOAT64 * numbers.sums
    # Gradients, and what AdamW holds while it steps; a unit's gradients before they are split.
    step = 2 * weights
    return {
        "score": (weights, BFLOAT16 * numbers.layer),
        "correct": (weights + sums, FLOAT32 * numbers.layer + sums),
        "begin to train": (weights + teacher, weights / devices + FLOAT32 * numbers.unit),
        "train": (kept + step, (kept + step) / devices + unit + BFLOAT16 * numbers.unit),
        "validate": (kept, kept / devices + unit),
        "save, the process that writes": (kept, kept / devices + FLOAT32 * numbers.tensor),
    }


def compare(*, split: Devices = Devices()) -> int:
    """Print a table for each model."""
    models = {"FLUX.1-dev": (FluxTransformer2DModel, FLUX), "SDXL": (UNet2DConditionModel, MODELS["sdxl"])}
    for title, (cls, config) in models.items():
        with torch.device("meta"):
            numbers = numbers_of(cls(**config))
        print(f"{title}, {numbers.all / 1e9:.2f} billion weights, {split.devices} devices:\n")
        print("| phase | in one piece | split, a device |\n|---|---|---|")
        for name, sizes in phases(numbers, split.devices).items():
            print(f"| {name} | {' | '.join(map(shown, sizes))} |")
        print(
            f"\nLargest unit {shown(FLOAT32 * numbers.unit)}, layer {shown(FLOAT32 * numbers.layer)}, tensor ", end=""
        )
        print(f"{shown(FLOAT32 * numbers.tensor)}; {math.ceil(numbers.all / split.devices):,} weights a device.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(script(compare, __file__)))

"""What the units of every channel group take of a denoiser's latency, measured on the machine it runs on.

Time is not linear in width: kernels work in tiles, and starting one costs the same at every width. So the block of a
group is cut and timed alone, on the inputs that it gets in a real forward, at several widths. What the full model and
the smallest subnet take as a whole is measured too and scales these times: blocks alone find their weights in the
cache.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.cutting import shrink_model
from ofadiff.denoisers.inputs import Inputs, forward_inputs
from ofadiff.extraction.subnet import extract
from ofadiff.profiling.timing import WARM_UP, measure_latencies, processor_name, seconds_of
from ofadiff.supernet import Supernet

# Widths that a group is timed at; between two of them its cost is interpolated.
TIMED_WIDTHS = 5

# Rounds over the widths of a block, whose fastest counts, and seconds that one timing takes: short calls are repeated.
BLOCK_ROUNDS = 7
BLOCK_SECONDS = 0.005

# The calls of a block in one forward, each with its positional and keyword arguments.
_Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class LatencyCosts:
    """How a denoiser's latency grows with the widths of its groups.

    Attributes:
        full: Latency of one forward at full size, in nanoseconds.
        processor: What it was measured on.
        points: For every group widths in units, ascending, the last one full, each with the nanoseconds that the group
            costs there; they never fall.
    """

    full: int
    processor: str
    points: Mapping[str, Sequence[tuple[int, int]]]

    def of(self, group: str, units: int) -> int:
        """Nanoseconds that a group costs at a width: on the line between the two timed widths around it.

        Raises:
            ValueError: If the width is smaller or larger than all that were timed.
        """
        points = self.points[group]
        for (below, less), (above, more) in itertools.pairwise([points[0], *points]):
            if below <= units <= above:
                return less if below == above else less + (more - less) * (units - below) // (above - below)
        raise ValueError(f"{group} was timed with {points[0][0]} to {points[-1][0]} units, not with {units}")


@torch.no_grad()
def measure_latency_costs(
    model: ModelMixin,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, Sequence[int]],
    inputs: Inputs | None = None,
) -> LatencyCosts:
    """Times every group's block at several of its widths. The model stays as it is; cut copies of blocks are timed.

    Args:
        model: The denoiser at full size, not elastic yet, on the device and in the dtype that shall be measured.
        groups: Its channel groups.
        widths: The widths that each group may have, ascending, the last one full; see `allocation.ladders`.
        inputs: Keyword arguments of the forward, or recordings of the model, whose first call is timed with the batch
            that it had; by default `example_inputs(model)`, a batch of one.

    Raises:
        ValueError: If the weights are offloaded or on the meta device, or no inputs are known for the model.
        TypeError: If the model is elastic.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model's weights are on the meta device or offloaded; latency is measured with all there")
    inputs = forward_inputs(model, inputs)
    device = next(model.parameters()).device
    homes = _homes(model, groups, inputs)
    with _recorded_calls(model, set(homes.values())) as calls:
        model(**inputs)
    timed: dict[str, list[tuple[int, float]]] = {}
    seconds = {}
    for group in groups:
        home = homes[group.name]
        block, inner = model.get_submodule(home), _inside(group, home)
        chosen = _choose(widths[group.name])
        # Blocks that are built alike and get alike inputs are timed once.
        key = repr((inner.slices, chosen, _outline(block), _outline(calls[home])))
        if key not in timed:
            timed[key] = _time_widths(block, inner, chosen, calls[home], device)
        seconds[group.name] = timed[key]
    smallest = extract(model, groups, {name: points[0][0] for name, points in seconds.items()}, {})
    smallest.requires_grad_(False)
    whole = measure_latencies({"full": model, "smallest": smallest}.items, lambda _: inputs)
    saved = sum(points[-1][1] - points[0][1] for points in seconds.values())
    scale = max(0.0, whole["full"] - whole["smallest"]) / saved if saved > 0 else 1.0
    return LatencyCosts(
        round(whole["full"] * 1e9),
        processor_name(device),
        {name: [(units, round(time * scale * 1e9)) for units, time in points] for name, points in seconds.items()},
    )


def _homes(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Mapping[str, Any]) -> dict[str, str]:
    """For every group the innermost module around its block and slices that a forward calls."""
    with _recorded_calls(model, {name for name, _ in model.named_modules()}, arguments=False) as calls:
        model(**inputs)
    homes = {}
    for group in groups:
        home = group.block
        inside = [part.module for part in group.slices]
        while home and not (calls[home] and all(name == home or name.startswith(f"{home}.") for name in inside)):
            home = home.rpartition(".")[0]
        homes[group.name] = home
    return homes


@contextmanager
def _recorded_calls(model: nn.Module, names: set[str], arguments: bool = True) -> Iterator[dict[str, _Calls]]:
    """Collects the calls of modules in the forwards of a `with` block."""
    calls: dict[str, _Calls] = {name: [] for name in names}

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        calls[name].append((args, kwargs) if arguments else ((), {}))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(record, name=name), with_kwargs=True)
        for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _inside(group: ChannelGroup, home: str) -> ChannelGroup:
    """The group with its names as seen from a module around it."""
    start = len(home) + 1 if home else 0
    slices = tuple(replace(part, module=part.module[start:]) for part in group.slices)
    return replace(group, name=group.block[start:], slices=slices)


def _choose(widths: Sequence[int]) -> list[int]:
    """Some of the widths a group may have, evenly spread: the ends are among them, and the smallest one above 0."""
    above = [units for units in widths if units > 0]
    count = min(TIMED_WIDTHS, len(above))
    spread = [above[round(index * (len(above) - 1) / max(1, count - 1))] for index in range(count)]
    return [*(units for units in widths if units == 0), *spread[:-1], above[-1]]


def _time_widths(
    block: nn.Module, group: ChannelGroup, widths: Sequence[int], calls: _Calls, device: torch.device
) -> list[tuple[int, float]]:
    """Seconds that the calls of a block take at each width of a group, in turns; more units never take less."""

    def run(cut: nn.Module) -> None:
        for args, kwargs in calls:
            cut(*args, **kwargs)

    sides = []
    for units in widths:
        cut = copy.deepcopy(block).eval().requires_grad_(False)
        shrink_model(cut, [group], {group.name: units})
        sides.append(partial(run, cut))
    for side in sides:
        for _ in range(WARM_UP):
            side()
    once = seconds_of(sides[-1], device)
    repeats = math.ceil(BLOCK_SECONDS / max(once, BLOCK_SECONDS / 100))
    rounds = [[seconds_of(side, device, repeats) for side in sides] for _ in range(BLOCK_ROUNDS)]
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    return list(zip(widths, itertools.accumulate(fastest, max), strict=True))


def _outline(value: Any) -> Any:
    """What of a module or of a call's arguments decides how long it takes, to compare."""
    if isinstance(value, nn.Module):
        return [
            (name, type(module).__name__, _outline({**vars(module), **module._parameters}))
            for name, module in value.named_modules()
        ]
    if isinstance(value, Mapping):
        return [(key, _outline(entry)) for key, entry in value.items() if not str(key).startswith("_")]
    if isinstance(value, (list, tuple)):
        return [_outline(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.stride()
    return value if isinstance(value, (bool, int, float, str)) else type(value).__name__


def latency_table(
    supernet: Supernet, inputs: Inputs | None = None, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Measures a forward of the full model and of every size's extracted model, in turns, on the supernet's device.

    Args:
        supernet: At any size.
        inputs: Keyword arguments of the forward, or recordings of the model, whose first call is timed with the batch
            that it had; by default `example_inputs`, a batch of one.
        dtype: Dtype of the models; the supernet's by default.

    Returns:
        Seconds: of `"full"`, and of every size by its name, such as `"0.4"`, from the largest to the smallest.

    Raises:
        ValueError: If no inputs are known for the model, or it has LoRAs or is offloaded.
    """
    full_widths = {group.name: group.width for group in supernet.groups}

    def models() -> Iterator[tuple[str, nn.Module]]:
        dtype_ = dtype or supernet.model.dtype
        # Not the method of diffusers models, which warns about every cast.
        full = extract(supernet.model, supernet.groups, full_widths, supernet.basis)
        yield "full", nn.Module.to(full, dtype_)
        for size in reversed(supernet.sizes):
            yield f"{size:g}", nn.Module.to(supernet.extract(size), dtype_)

    return measure_latencies(models, partial(forward_inputs, inputs=inputs))

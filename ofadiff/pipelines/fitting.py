"""The largest size that a device has the time and the memory for: measured there once, and remembered."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub.constants import HF_HOME

from ofadiff.diffusers_hooks import hooks_of
from ofadiff.pipelines.calls import check_calls, described, opened, without_bar
from ofadiff.profiling import peak_memory_of, processor_name
from ofadiff.profiling.timing import seconds_of
from ofadiff.reading.json_file import read_json, shown
from ofadiff.reading.numbers import is_number

logger = logging.get_logger(__name__)

MEASURED = "measured.json"
STEPS = "num_inference_steps"

# A call of many steps is timed with so few and so many: what lies between is what the other steps take too.
FEW, MANY, ROUNDS = 2, 6, 3


class FittingSize(float):
    """A size that was chosen because it fits; a number like any size.

    Attributes:
        reason: One line that says what was measured, and what the next larger size would take.
    """

    reason: str

    def __new__(cls, size: float, reason: str) -> FittingSize:
        made = super().__new__(cls, size)
        made.reason = reason
        return made

    def __reduce__(self) -> tuple:
        return FittingSize, (float(self), self.reason)


@dataclass(frozen=True)
class Budget:
    """What there is to spend; None is no bound.

    Attributes:
        latency_ms: Milliseconds of one call of the pipeline.
        memory: Bytes.
    """

    latency_ms: float | None
    memory: int | None

    @classmethod
    def of(cls, latency_ms: float | None, memory: int | str | None, name: str = "memory") -> Budget:
        """What a user said.

        Raises:
            ValueError: If it cannot be a budget, or there is none.
        """
        if latency_ms is None and memory is None:
            raise ValueError(f"there is no budget; give latency_ms (milliseconds), {name} (such as '6GB'), or both")
        if latency_ms is not None and not (is_number(latency_ms) and latency_ms > 0):
            raise ValueError(f"latency_ms is {shown(latency_ms)}; it must be a number of milliseconds above 0")
        return cls(latency_ms, None if memory is None else _bytes(memory, name))


def _bytes(memory: Any, name: str) -> int:
    size = memory
    if isinstance(memory, str) and (written := re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", memory.strip())):
        digits, unit, binary = written.groups()
        size = float(digits) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1)
    if not is_number(size) or size < 1:
        raise ValueError(
            f"{name} is {shown(memory)}; it must be a number of bytes above 0, or a text such as '6GB' or '6GiB'"
        )
    return int(size)


@dataclass(frozen=True)
class CallCost:
    """What one call of a pipeline takes on a device.

    Attributes:
        latency_ms: Milliseconds.
        memory: Peak, in bytes: weights of all components, and the most that the call holds on top of them.
    """

    latency_ms: float
    memory: int

    def fits(self, budget: Budget) -> bool:
        """Whether a budget allows it."""
        in_time = budget.latency_ms is None or self.latency_ms <= budget.latency_ms
        return in_time and (budget.memory is None or self.memory <= budget.memory)

    def __str__(self) -> str:
        milliseconds = math.ceil(self.latency_ms * 100) / 100
        return f"{milliseconds if milliseconds < 100 else math.ceil(milliseconds)} ms and {in_words(self.memory)}"


def in_words(size: float) -> str:
    """Bytes as people read them, rounded up, so that what is shown would fit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{math.ceil(size / factor * 100) / 100:g}{unit}"
    return f"{size:g} bytes"


def call_to_measure(stock: type[DiffusionPipeline], call: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the call that is measured: what a user said, or the least that a pipeline can be called with.

    Raises:
        ValueError: If a pipeline of the stock class does not take them, or needs more.
    """
    takes = inspect.signature(stock.__call__).parameters
    least = {"prompt": "a"} if "prompt" in takes else {"class_labels": [0]} if "class_labels" in takes else {}
    try:
        (checked,) = check_calls(stock, [least if call is None else call])
    except ValueError as error:
        if call is None:
            raise ValueError(f"say call=, the arguments of the call that is measured: {error}") from None
        raise
    return opened(checked)


def cost_of_call(pipeline: Any, call: Mapping[str, Any]) -> CallCost:
    """Measures one call of a pipeline that holds one size.

    A call of more than `MANY` denoising steps is not made: its time is that of `FEW` of them, and for every other step
    what a step takes between `FEW` and `MANY`. Of a call that denoises a part of the way only, as image-to-image does,
    so many steps are taken that these are left.

    Raises:
        ValueError: If the pipeline is neither on the CPU nor on a CUDA device.
    """
    device = pipeline._execution_device
    takes = inspect.signature(pipeline._stock_class.__call__).parameters
    steps = call.get(STEPS, takes[STEPS].default if STEPS in takes else None)
    share = _share_of_the_way({**{name: each.default for name, each in takes.items()}, **call})
    few, many = (math.ceil(count / share) for count in (FEW, MANY))
    long = isinstance(steps, int) and steps > many
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]

    def made(count: int | None) -> Callable[[], Any]:
        return partial(pipeline, **{**call, **({} if count is None else {STEPS: count})})

    with without_bar(pipeline):
        memory = peak_memory_of(made(few if long else None), tensors, device)
        if not long:
            return CallCost(_milliseconds(made(None), device), memory)
        short, longer = (_milliseconds(made(count), device) for count in (few, many))
    return CallCost(short + max(longer - short, 0) / (many - few) * (steps - few), memory)


def _share_of_the_way(arguments: Mapping[str, Any]) -> float:
    """How much of the way from noise to image a call with these arguments denoises."""
    strength, begin, end = (arguments.get(name) for name in ("strength", "denoising_start", "denoising_end"))
    first = begin if is_number(begin) else 1 - strength if is_number(strength) else 0
    share = (end if is_number(end) else 1) - first
    return share if 0 < share <= 1 else 1.0  # what cannot be is the pipeline's to refuse


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    return 1000 * statistics.median(seconds_of(call, device) for _ in range(ROUNDS))


def largest_that_fits(
    sizes: Sequence[float], cost_at: Callable[[float], CallCost | None], budget: Budget, device: torch.device
) -> FittingSize:
    """The largest size that a budget allows.

    Args:
        sizes: Ascending.
        cost_at: Measures a size; None if it cannot even be tried, as where its weights alone are too much.
        budget: What there is to spend.
        device: Where it is measured.

    Raises:
        ValueError: If none fits; says what would.
    """
    larger = ""
    where = processor_name(device)
    seen: list[tuple[float, CallCost]] = []
    for size in reversed(sizes):
        cost = cost_at(size)
        if cost is None:
            larger = f"; {size:g} does not fit into memory"
            continue
        if cost.fits(budget):
            reason = f"size {size:g} takes {cost} a call on {where}{larger}"
            logger.info(reason)
            return FittingSize(size, reason)
        seen.append((size, cost))
        larger = f"; {size:g} would take {cost}"
    asked = " and ".join(
        text
        for text, given in (
            (f"{budget.latency_ms or 0:g} ms", budget.latency_ms),
            (in_words(budget.memory or 0), budget.memory),
        )
        if given is not None
    )
    would = "".join(f"; {size:g} would with {cost}" for size, cost in reversed(seen))
    raise ValueError(f"no size fits {asked} a call on {where}{would or larger}")


class Measurements:
    """What calls took on this machine, kept in a file; what cannot be read there is measured anew.

    Args:
        file: By default `ofadiff/measured.json` in the cache of Hugging Face's libraries, `HF_HOME`.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = Path(HF_HOME) / "ofadiff" / MEASURED if file is None else Path(file)

    def get(self, key: str) -> CallCost | None:
        """What was measured, if it was."""
        found = self._read().get(key)
        if not isinstance(found, dict) or found.keys() != {"latency_ms", "memory"}:
            return None
        return CallCost(**found) if all(is_number(value) and value > 0 for value in found.values()) else None

    def put(self, key: str, cost: CallCost) -> None:
        """Remembers what was measured; where nothing can be written, a warning says so."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self._read(), key: asdict(cost)}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False, encoding="utf-8") as unfinished:
                unfinished.write(text)
            try:
                os.replace(unfinished.name, self.file)
            finally:
                Path(unfinished.name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"what was measured is not remembered: {error}")

    def _read(self) -> dict[str, Any]:
        try:
            values = read_json(self.file)
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def key_of(pipeline: Any, call: Mapping[str, Any]) -> str:
    """What a measurement depends on, as a digest: device, versions, components and the call."""
    device = pipeline._execution_device
    values = {
        "device": processor_name(device),
        "versions": [version(name) for name in ("torch", "diffusers", "ofadiff")],
        "pipeline": pipeline._stock_class.__name__,
        "parts": {name: _part(part) for name, part in pipeline.components.items()},
        "call": described(dict(call)),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _part(part: Any) -> Any:
    if not isinstance(part, torch.nn.Module):
        return type(part).__name__
    weights = [
        [name, list(tensor.shape), str(tensor.dtype), type(tensor).__name__] for name, tensor in part.named_parameters()
    ]
    # What changes a call's time and memory at the same weights: tiling and slicing, attention processors, offloading.
    settings = {name: value for name, value in vars(part).items() if isinstance(value, (bool, int, float))}
    added = [
        type(each).__name__
        for module in part.modules()
        for each in (vars(module).get("processor"), vars(module).get("_hf_hook"), *hooks_of(module))
    ]
    return [type(part).__name__, hashlib.sha256(json.dumps([weights, settings, added]).encode()).hexdigest()]


def remembered_cost(
    pipeline: Any, call: Mapping[str, Any], measurements: Measurements, measure_again: bool = False
) -> CallCost:
    """What a call of a pipeline with one size takes: from the last time, or measured now."""
    key = key_of(pipeline, call)
    cost = None if measure_again else measurements.get(key)
    if cost is None:
        cost = cost_of_call(pipeline, call)
        measurements.put(key, cost)
    return cost

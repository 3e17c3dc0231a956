"""Time that forwards take on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ofadiff.denoisers.inputs import example_inputs

# What a latency is the median of: rounds over all models, with so many forwards of each after two that warm it up.
ROUNDS = 5
REPEATS = 4
WARM_UP = 2


@torch.no_grad()
def measure_latencies(
    models: Callable[[], Iterable[tuple[str, nn.Module]]],
    inputs: Callable[[nn.Module], Mapping[str, Any]] = example_inputs,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Median time of each model's forward, in seconds.

    The models take turns, round by round: a machine that is busier or hotter for a while slows all of them.

    Args:
        models: Gives the models by name, in every round anew, so that only one has to be held at a time.
        inputs: Gives the keyword arguments of a model's forward; by default those of a batch of one.
        rounds: Rounds over all models, of `REPEATS` forwards each.

    Raises:
        ValueError: If `rounds` is below 1, or no inputs are known for a model.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, model in models():
            forward = partial(model, **inputs(model))
            for _ in range(WARM_UP):
                forward()
            device = next(model.parameters()).device
            times[name] += [seconds_of(forward, device) for _ in range(REPEATS)]
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds that a call takes on a device, on average over calls one behind the other."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def processor_name(device: torch.device) -> str:
    """What does the work: the GPU, or the CPU and how many threads of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

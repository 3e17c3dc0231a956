"""Latency and peak memory of one forward, in denoisers to compare."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ofadiff.cost import example_inputs

# What a latency is the median of: rounds over all models, with so many forwards of each after two that warm it up.
ROUNDS = 5
REPEATS = 4
WARM_UP = 2


@torch.no_grad()
def measure_latencies(
    models: Callable[[], Iterable[tuple[str, nn.Module]]], batch_size: int = 1, rounds: int = ROUNDS
) -> dict[str, float]:
    """Median time of each model's forward, in seconds.

    The models take turns, round by round: a machine that is busier or hotter for a while slows all of them.

    Args:
        models: Gives the models by name, in every round anew, so that only one has to be held at a time.
        batch_size: Images of the forward, which gets `example_inputs`.
        rounds: Rounds over all models, of `REPEATS` forwards each.

    Raises:
        ValueError: If `rounds` is below 1, or no inputs are known for a model.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, model in models():
            inputs = example_inputs(model, batch_size)
            for _ in range(WARM_UP):
                model(**inputs)
            times[name] += [_time_forward(model, inputs) for _ in range(REPEATS)]
    return {name: statistics.median(values) for name, values in times.items()}


def _time_forward(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    device = next(model.parameters()).device
    _synchronize(device)
    start = time.perf_counter()
    model(**inputs)
    _synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def measure_peak_memory(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> int:
    """Peak memory of a forward, in bytes: weights, inputs, and the most that the forward holds on top of them.

    What else lives on the device does not count. On the CPU, libraries' own buffers outside PyTorch's allocator don't
    either.

    Args:
        model: The denoiser, on the CPU or a CUDA device.
        inputs: Keyword arguments of the forward; by default `example_inputs(model)`, a batch of one.

    Raises:
        ValueError: If the device is neither, or no inputs are known for the model.
    """
    inputs = example_inputs(model) if inputs is None else inputs
    device = next(model.parameters()).device
    if device.type not in PEAKS:
        raise ValueError(f"the model is on {device.type!r}; peak memory is measured on {' and '.join(PEAKS)}")
    model(**inputs)  # a first forward sets up what stays: plans, workspaces, caches
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(dict(inputs))]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values()) + PEAKS[device.type](model, inputs)


def _peak_on_cpu(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    with _native_messages_off(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def _peak_on_cuda(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    device = next(model.parameters()).device
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


PEAKS = {"cpu": _peak_on_cpu, "cuda": _peak_on_cuda}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


@contextlib.contextmanager
def _native_messages_off() -> Iterator[None]:
    """The profiler's C++ side reports its start and stop on file descriptor 2, in the middle of progress bars."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)

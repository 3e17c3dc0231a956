"""Peak memory of one forward."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ofadiff.denoisers.inputs import example_inputs


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
    given = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *given]
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

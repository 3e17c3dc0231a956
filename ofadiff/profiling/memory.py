"""Peak memory of one forward, or of a whole call of a pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    given = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    return peak_memory_of(lambda: model(**inputs), [*model.parameters(), *model.buffers(), *given], device)


def peak_memory_of(call: Callable[[], Any], tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Peak memory of a call, in bytes: tensors that are there before it, and the most that it holds on top of them.

    Args:
        call: It is made twice: what stays from the first, such as plans, workspaces and caches, does not count.
        tensors: What the call needs and does not make, such as weights; each storage counts once.
        device: Where it computes, the CPU or a CUDA device.

    Raises:
        ValueError: If the device is neither.
    """
    if device.type not in PEAKS:
        raise ValueError(f"the model is on {device.type!r}; peak memory is measured on {' and '.join(PEAKS)}")
    call()
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values()) + PEAKS[device.type](call, device)


def _peak_on_cpu(call: Callable[[], Any], device: torch.device) -> int:
    with _native_messages_off(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def _peak_on_cuda(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
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

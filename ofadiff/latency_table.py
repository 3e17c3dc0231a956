"""The latency of every size on this machine, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ofadiff.extracted import extract
from ofadiff.inputs import example_inputs
from ofadiff.supernet import Supernet
from ofadiff.timing import measure_latencies, processor_name


def latency_table(supernet: Supernet, inputs: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None) -> str:
    """Measures the full model and the extracted model of every size, in turns, on the supernet's device.

    Args:
        supernet: At any size.
        inputs: Keyword arguments of the forward; by default `example_inputs`, a batch of one.
        dtype: Of the models; the supernet's by default.

    Returns:
        A Markdown table: milliseconds of a forward and their share of the full model's; beside it the share that
        `allocate` predicted, where it did.

    Raises:
        ValueError: If no inputs are known for the model, or it has LoRAs or is offloaded.
    """
    model, subnets = supernet.model, supernet.subnets
    full_widths = {group.name: group.width for group in supernet.groups}

    def models() -> Iterator[tuple[str, nn.Module]]:
        yield "full", extract(model, supernet.groups, full_widths, supernet.basis).to(dtype or model.dtype)
        for size in reversed(supernet.sizes):
            yield f"{size:g}", supernet.extract(size).to(dtype or model.dtype)

    measured = measure_latencies(models, example_inputs if inputs is None else lambda _: inputs)
    predicted = {
        f"{subnet.size:g}": subnet.latency_ms / subnets.full_latency_ms
        for subnet in subnets
        if subnet.latency_ms is not None and subnets.full_latency_ms is not None
    }
    lines = ["| size | latency, ms | of the full model | predicted |", "| ---: | ---: | ---: | ---: |"]
    for name, seconds in measured.items():
        share = f"{predicted[name]:.3f}" if name in predicted else ""
        lines.append(f"| {name} | {seconds * 1e3:.4g} | {seconds / measured['full']:.3f} | {share} |")
    return "\n".join([f"One forward on {processor_name(model.device)}, {dtype or model.dtype}:", "", *lines])

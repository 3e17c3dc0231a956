"""What a size is a fraction of, and the widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ofadiff.allocation.equation_5 import ordered_steps
from ofadiff.allocation.width_ladders import ladders
from ofadiff.channels import ChannelGroup
from ofadiff.profiling.cost import UnitCosts
from ofadiff.profiling.latency import LatencyCosts
from ofadiff.sizes import TOLERANCE

BUDGETS = ("params", "macs", "latency", "channels")

# What a group costs when it keeps so many units: `cost_of(group name, units)`.
CostOf = Callable[[str, int], int]


def budget_widths(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    sizes: Sequence[float],
    budget: str,
    min_keep: float,
    alignment: int,
    full: int,
    cost_of: CostOf,
) -> dict[float, dict[str, int]]:
    widths = ladders(groups, min_keep, alignment)
    smallest = cost_at(full, cost_of, groups, {name: rungs[0] for name, rungs in widths.items()})
    if sizes[0] * full < smallest - TOLERANCE * full:
        raise ValueError(
            f"size {sizes[0]:g} is not possible: with min_keep {min_keep:g} the smallest subnet has "
            f"{smallest / full:.4f} of the full model's {budget}; ask for {math.ceil(smallest / full * 100) / 100:g} "
            f"or more{', or lower min_keep' if min_keep else ''}"
        )
    steps = ordered_steps(groups, scores, widths)
    chosen: dict[float, dict[str, int]] = {}
    position = dict.fromkeys(widths, 0)
    cost = smallest
    for size in sizes:
        # The next steps in the order of P. A step that no longer fits closes its group, and later ones fill the rest.
        closed: set[str] = set()
        for name, rung in steps:
            if rung != position[name] + 1 or name in closed:
                continue
            more = cost_of(name, widths[name][rung]) - cost_of(name, widths[name][rung - 1])
            if cost + more > size * full:
                closed.add(name)
                continue
            position[name], cost = rung, cost + more
        chosen[size] = {name: widths[name][rung] for name, rung in position.items()}
    return chosen


def costs_of(budget: str, costs: UnitCosts, latencies: LatencyCosts | None) -> tuple[int, CostOf]:
    """What the full model costs in a budget, and what a group does."""
    if budget == "latency" and latencies is not None:
        return latencies.full, latencies.of
    full, unit = (costs.params, costs.unit_params) if budget == "params" else (costs.macs, costs.unit_macs)
    return full, lambda group, units: unit[group] * units


def cost_at(full: int, cost_of: CostOf, groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> int:
    return full - sum(cost_of(group.name, group.width) - cost_of(group.name, widths[group.name]) for group in groups)

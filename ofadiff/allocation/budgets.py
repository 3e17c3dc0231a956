"""What a size is a fraction of, and the widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ofadiff.allocation.equation_5 import ordered_steps
from ofadiff.allocation.width_ladders import ladders
from ofadiff.channels import ChannelGroup
from ofadiff.profiling.cost import UnitCosts
from ofadiff.profiling.latency import LatencyCosts
from ofadiff.sizes import TOLERANCE


@dataclass(frozen=True)
class Costs:
    """What a model costs in a budget, as a sum over its groups.

    Attributes:
        full: What the full model costs.
        of: `of(group name, units)`: what a group costs when it keeps so many units.
    """

    full: int
    of: Callable[[str, int], int]

    def at(self, groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> int:
        """What the subnet costs whose groups keep so many units."""
        return self.full - sum(self.of(g.name, g.width) - self.of(g.name, widths[g.name]) for g in groups)


def parameters(costs: UnitCosts, latencies: LatencyCosts | None) -> Costs:
    """Weights and biases."""
    return Costs(costs.params, lambda group, units: costs.unit_params[group] * units)


def macs(costs: UnitCosts, latencies: LatencyCosts | None) -> Costs:
    """Multiply-accumulate operations of one forward."""
    assert costs.macs is not None
    return Costs(costs.macs, lambda group, units: costs.unit_macs[group] * units)


def latency(costs: UnitCosts, latencies: LatencyCosts | None) -> Costs:
    """Nanoseconds of one forward, as they were measured group by group."""
    assert latencies is not None
    return Costs(latencies.full, latencies.of)


# A new budget is a function and a line here.
COSTS: dict[str, Callable[[UnitCosts, LatencyCosts | None], Costs]] = {
    "params": parameters,
    "macs": macs,
    "latency": latency,
}
# The paper's retention rate is a budget of no cost: what its subnets cost is only reported.
BUDGETS = (*COSTS, "channels")


def budget_widths(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    sizes: Sequence[float],
    budget: str,
    costs: Costs,
    min_keep: float,
    alignment: int,
) -> dict[float, dict[str, int]]:
    """Widths at each size that come as close to it as the groups' ladders allow, and not above; nested.

    Args:
        groups: The channel groups.
        scores: For every group its scores, `(width,)`.
        sizes: Fractions of the full cost, ascending.
        budget: Name of the budget, for an error.
        costs: Of that budget.
        min_keep: As in `allocate`.
        alignment: As in `allocate`.

    Raises:
        ValueError: If the smallest size is below the smallest subnet.
    """
    widths = ladders(groups, min_keep, alignment)
    full = costs.full
    smallest = costs.at(groups, {name: rungs[0] for name, rungs in widths.items()})
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
            more = costs.of(name, widths[name][rung]) - costs.of(name, widths[name][rung - 1])
            if cost + more > size * full:
                closed.add(name)
                continue
            position[name], cost = rung, cost + more
        chosen[size] = {name: widths[name][rung] for name, rung in position.items()}
    return chosen

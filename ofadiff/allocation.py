"""How many units each group keeps at a size (equation 5), exact in parameters, MACs or measured costs in time.

Equation 5 keeps C_l = max(min(Î_l · K_B · P · |l|, |l|), P0 · |l|) of layer l, where Î_l is the layer's share of the
importance in its block B, K_B the number of layers there, P the retention rate and P0 its floor. So unit number w of a
group is reached when P has grown to w / (Î_l · K_B · |l|). Sorting all steps of all groups by that P gives one
sequence; every budget is a prefix of it, what a full layer cannot take goes to the others, and subnets nest by
construction.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.cost import UnitCosts, unit_costs
from ofadiff.latency import LatencyCosts, measure_latency_costs
from ofadiff.sizes import TOLERANCE, SizeTable, Subnet

BUDGETS = ("params", "macs", "latency", "channels")

# What a group costs when it keeps so many units: `cost_of(group name, units)`.
CostOf = Callable[[str, int], int]

# With min_keep=0 a group keeps nothing or at least this: what equation 5 puts below its own floor is dropped.
DROP_BELOW = 0.25

# A group whose aligned widths would be fewer than this takes finer steps: alignment must not make it rigid.
MIN_STEPS = 4


def allocate(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    sizes: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    budget: str = "params",
    min_keep: float = 0.25,
    alignment: int = 8,
    inputs: Mapping[str, Any] | None = None,
    latencies: LatencyCosts | None = None,
) -> SizeTable:
    """Widths of nested subnets, one for each size.

    Scores are compared among groups of one kind in one resolution block. With `budget="channels"` the size is the
    paper's retention rate P and equation 5 is taken as printed: all layers of a block are compared, nothing that the
    clip takes is given to others, widths are not aligned, and the real cost is only reported.

    With `budget="latency"` the size is a fraction of the time that the full model takes on the machine this runs on, on
    the model's device and in its dtype. What is met is the sum of what groups cost, measured one by one: the latency of
    a whole subnet can differ from it by some percent. `cost.latency_table` measures it.

    Args:
        model: The denoiser at full size.
        groups: Its channel groups.
        scores: For every group its scores, `(width,)`, not negative.
        sizes: Fractions of the full model's budget, each in (0, 1]; at least one.
        budget: What a size is a fraction of: `"params"`, `"macs"`, `"latency"`, or `"channels"`.
        min_keep: Smallest share of its units that a group keeps, in [0, 1]. With 0, a group whose share would be less
            than a quarter is dropped: its branch then adds nothing but a constant bias. A group that cannot be dropped
            (`ChannelGroup.droppable`) keeps a quarter.
        alignment: Keep multiples of this many channels (of the head dimension in attention), 1 for any number. A group
            that would have fewer than four such widths takes finer steps. Full width always counts as aligned.
        inputs: Keyword arguments of the forward that MACs and latency are measured on; by default
            `example_inputs(model)`, a batch of one.
        latencies: What `measure_latency_costs` found, for `ladders` of the same `min_keep` and `alignment`. If it is
            not given, a budget in latency measures now. Given with another budget, subnets say their latency too.

    Returns:
        The subnets in ascending order, each within 0.5 % of the full model's budget where the units allow.

    Warns:
        UserWarning: If a size is off by more than 0.5 % of the full model's budget; names it and what it has reached.

    Raises:
        ValueError: If an argument is out of range, scores do not fit the groups, or a size is below the smallest
            possible one, which is named, or two sizes come to the same subnet.

    Example:
        >>> subnets = allocate(unet, groups, scores, sizes=(0.5, 0.75, 1.0))
        >>> subnets[0.5].params / subnets.full_params
        0.5003
    """
    sizes = _checked_sizes(sizes)
    if budget not in BUDGETS:
        raise ValueError(f"budget is {budget!r}; it must be one of {', '.join(BUDGETS)}")
    if not 0 <= min_keep <= 1:
        raise ValueError(f"min_keep is {min_keep}; it must lie in [0, 1], where 0 lets whole branches be dropped")
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}; it must be at least 1")
    check_scores(groups, scores)
    costs = unit_costs(model, groups, inputs)
    if budget == "latency" and latencies is None:
        latencies = measure_latency_costs(model, groups, ladders(groups, min_keep, alignment), inputs)

    def total(budget: str, widths: Mapping[str, int]) -> int:
        return _cost(*_costs_of(budget, costs, latencies), groups, widths)

    if budget == "channels":
        widths_of = {size: _paper_widths(groups, scores, size, min_keep) for size in sizes}
    else:
        full, cost_of = _costs_of(budget, costs, latencies)
        widths_of = _budget_widths(groups, scores, sizes, budget, min_keep, alignment, full, cost_of)
    subnets = [
        Subnet(
            size,
            widths,
            total("params", widths),
            total("macs", widths),
            None if latencies is None else total("latency", widths) / 1e6,
        )
        for size, widths in widths_of.items()
    ]
    for smaller, larger in itertools.pairwise(subnets):
        if smaller.widths == larger.widths:
            raise ValueError(
                f"sizes {smaller.size:g} and {larger.size:g} come to the same subnet; no width lies between them"
            )
    measured = (None, None) if latencies is None else (latencies.full / 1e6, latencies.processor)
    table = SizeTable(subnets, budget, min_keep, costs.params, costs.macs, *measured)
    if table.missed:
        warnings.warn(
            f"sizes are missed by more than {TOLERANCE:.1%} of the full model's {budget}: {table.reached_in_words()}; "
            "the widths that its groups may have are too coarse to come closer (a smaller alignment gives more)",
            stacklevel=2,
        )
    return table


def check_scores(groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless every group has finite scores of shape `(width,)` that are not negative."""
    for group in groups:
        if group.name not in scores:
            raise ValueError(f"scores lack {group.name}; every channel group needs scores of shape (width,)")
        score = scores[group.name]
        if tuple(score.shape) != (group.width,):
            raise ValueError(f"scores of {group.name} have shape {tuple(score.shape)}; it must be ({group.width},)")
        if not torch.isfinite(score).all() or (score < 0).any():
            raise ValueError(f"scores of {group.name} must be finite and not negative, got {score.tolist()}")


def _checked_sizes(sizes: Sequence[float]) -> list[float]:
    ordered = sorted(float(size) for size in sizes)
    if not ordered:
        raise ValueError("sizes is empty; it must hold at least one fraction in (0, 1]")
    for size in ordered:
        if not 0 < size <= 1:
            raise ValueError(f"size is {size:g}; every size must lie in (0, 1]")
    if len(set(ordered)) < len(ordered):
        raise ValueError(f"sizes are {', '.join(f'{size:g}' for size in ordered)}; every size may appear once")
    return ordered


def _shares(groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], by_kind: bool) -> dict[str, float]:
    """Î_l · K_B of every group: its share of its block's importance, times the groups there (1 on average)."""
    blocks: dict[tuple[str, str], list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        blocks[group.stage, group.kind if by_kind else ""].append(group)
    shares = {}
    for members in blocks.values():
        importance = {group.name: float(scores[group.name].double().sum()) for group in members}
        total = sum(importance.values())
        for name, value in importance.items():
            # A block without any importance has nothing to compare: its groups share alike.
            shares[name] = value / total * len(members) if total > 0 else 1.0
    return shares


def _paper_widths(
    groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], P: float, P_0: float
) -> dict[str, int]:
    """Equation 5 as printed, rounded to whole units. P = 1 is the full model."""
    shares = _shares(groups, scores, by_kind=False)
    widths = {}
    for group in groups:
        kept = max(min(shares[group.name] * P * group.width, group.width), P_0 * group.width)
        widths[group.name] = group.width if P == 1 else max(0 if group.droppable else 1, round(kept))
    return widths


def _budget_widths(
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
    smallest = _cost(full, cost_of, groups, {name: rungs[0] for name, rungs in widths.items()})
    if sizes[0] * full < smallest - TOLERANCE * full:
        raise ValueError(
            f"size {sizes[0]:g} is not possible: with min_keep {min_keep:g} the smallest subnet has "
            f"{smallest / full:.4f} of the full model's {budget}; ask for {math.ceil(smallest / full * 100) / 100:g} "
            f"or more{', or lower min_keep' if min_keep else ''}"
        )
    steps = _steps(groups, scores, widths)
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


def ladders(groups: Sequence[ChannelGroup], min_keep: float = 0.25, alignment: int = 8) -> dict[str, list[int]]:
    """For every group the widths that `allocate` may give it, ascending."""
    return {group.name: ladder(group, min_keep, alignment) for group in groups}


def ladder(group: ChannelGroup, min_keep: float, alignment: int) -> list[int]:
    """The widths that a group may have, ascending: 0 if it may be dropped, multiples of its step, and full width."""
    step = group.step(alignment)
    while step > 1 and group.width < MIN_STEPS * step:
        step = max(1, step // 2)
    floor = max(1, math.ceil((min_keep or DROP_BELOW) * group.width - 1e-9))
    ladder = list(range(math.ceil(floor / step) * step, group.width, step))
    return [*([0] if min_keep == 0 and group.droppable else []), *ladder, group.width]


def _steps(
    groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], ladders: Mapping[str, list[int]]
) -> list[tuple[str, int]]:
    """Every step (group, position on its ladder), in the order in which a growing P reaches it."""
    shares = _shares(groups, scores, by_kind=True)
    reached = []
    for index, group in enumerate(groups):
        for rung in range(1, len(ladders[group.name])):
            width = ladders[group.name][rung]
            P = width / (shares[group.name] * group.width) if shares[group.name] > 0 else math.inf
            reached.append((P, width / group.width, index, rung))
    return [(groups[index].name, rung) for _, _, index, rung in sorted(reached)]


def _costs_of(budget: str, costs: UnitCosts, latencies: LatencyCosts | None) -> tuple[int, CostOf]:
    """What the full model costs in a budget, and what a group does."""
    if budget == "latency" and latencies is not None:
        return latencies.full, latencies.of
    full, unit = (costs.params, costs.unit_params) if budget == "params" else (costs.macs, costs.unit_macs)
    return full, lambda group, units: unit[group] * units


def _cost(full: int, cost_of: CostOf, groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> int:
    return full - sum(cost_of(group.name, group.width) - cost_of(group.name, widths[group.name]) for group in groups)

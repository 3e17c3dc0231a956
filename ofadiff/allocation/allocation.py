"""How many units each group keeps at a size, exact in parameters, MACs or measured costs in time.

By equation 5 (`equation_5.py`) unit number w of a group is reached when P has grown to w / (Î_l · K_B · |l|). Sorting
all steps of all groups by that P gives one sequence; every budget is a prefix of it, what a full layer cannot take goes
to the others, and subnets nest by construction.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ofadiff.allocation.budgets import BUDGETS, COSTS, budget_widths
from ofadiff.allocation.equation_5 import paper_widths
from ofadiff.allocation.width_ladders import ladders
from ofadiff.channels import ChannelGroup, check_groups, check_scores
from ofadiff.denoisers.inputs import Inputs
from ofadiff.profiling.cost import UnitCosts, count_macs, unit_costs
from ofadiff.profiling.latency import LatencyCosts, measure_latency_costs
from ofadiff.reading.arguments import check_argument, check_choice, check_number, check_whole
from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number
from ofadiff.sizes import TOLERANCE, SizeTable, Subnet


def allocate(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    sizes: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    budget: str = "params",
    min_keep: float = 0.25,
    alignment: int = 8,
    inputs: Inputs | None = None,
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
        inputs: Keyword arguments of the forward that MACs and latency are measured on, or recordings of the model; by
            default `example_inputs(model)`, a batch of one. Without any for the model's class MACs are None.
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
        >>> round(subnets[0.5].params / subnets.full_params, 2)
        0.5
    """
    _checked_sizes(sizes)
    _check_options(budget, min_keep, alignment)
    check_groups(model, groups)
    check_scores(groups, scores)
    if latencies is not None:
        check_argument("latencies", latencies, isinstance(latencies, LatencyCosts), "what measure_latency_costs found")
    costs = unit_costs(model, groups, inputs)
    if budget == "macs" and costs.macs is None:
        count_macs(model, inputs)  # says why there are none
    if budget == "latency" and latencies is None:
        latencies = measure_latency_costs(model, groups, ladders(groups, min_keep, alignment), inputs)
    return allocate_costs(groups, scores, costs, sizes, budget, min_keep, alignment, latencies)


def allocate_costs(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    costs: UnitCosts,
    sizes: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    budget: str = "params",
    min_keep: float = 0.25,
    alignment: int = 8,
    latencies: LatencyCosts | None = None,
) -> SizeTable:
    """Like `allocate`, where what groups cost is known."""
    sizes = _checked_sizes(sizes)
    _check_options(budget, min_keep, alignment)
    check_scores(groups, scores)
    if budget == "channels":
        widths_of = {size: paper_widths(groups, scores, size, min_keep) for size in sizes}
    else:
        budgeted = COSTS[budget](costs, latencies)
        widths_of = budget_widths(groups, scores, sizes, budget, budgeted, min_keep, alignment)
    table = SizeTable(
        _subnets(groups, widths_of, costs, latencies),
        budget,
        min_keep,
        costs.params,
        costs.macs,
        *((None, None) if latencies is None else (latencies.full / 1e6, latencies.processor)),
    )
    if table.missed:
        warnings.warn(
            f"sizes are missed by more than {TOLERANCE:.1%} of the full model's {budget}: {table.reached_in_words()}; "
            "the widths that its groups may have are too coarse to come closer (a smaller alignment gives more)",
            stacklevel=3,
        )
    return table


def _check_options(budget: str, min_keep: float, alignment: int) -> None:
    check_choice("budget", budget, BUDGETS)
    check_number("min_keep", min_keep, 0, 1, "a number in [0, 1], where 0 lets whole branches be dropped")
    check_whole("alignment", alignment, 1)


def _subnets(
    groups: Sequence[ChannelGroup],
    widths_of: Mapping[float, dict[str, int]],
    costs: UnitCosts,
    latencies: LatencyCosts | None,
) -> list[Subnet]:
    """The subnets of some widths with their costs. Raises ValueError if two sizes have the same widths."""

    def total(budget: str, widths: Mapping[str, int]) -> int:
        return COSTS[budget](costs, latencies).at(groups, widths)

    subnets = [
        Subnet(
            size,
            widths,
            total("params", widths),
            None if costs.macs is None else total("macs", widths),
            None if latencies is None else total("latency", widths) / 1e6,
        )
        for size, widths in widths_of.items()
    ]
    for smaller, larger in itertools.pairwise(subnets):
        if smaller.widths == larger.widths:
            raise ValueError(
                f"sizes {smaller.size:g} and {larger.size:g} come to the same subnet; no width lies between them"
            )
    return subnets


def _checked_sizes(sizes: Sequence[float]) -> list[float]:
    several = isinstance(sizes, Iterable) and not isinstance(sizes, (str, torch.Tensor))
    check_argument("sizes", sizes, several, "a list of fractions in (0, 1]")
    given = list(sizes)
    if not given:
        raise ValueError("sizes is empty; it must hold at least one fraction in (0, 1]")
    for size in given:
        if not (is_number(size) and 0 < size <= 1):
            raise ValueError(f"size is {shown(size)}; every size must lie in (0, 1]")
    ordered = sorted(float(size) for size in given)
    if len(set(ordered)) < len(ordered):
        raise ValueError(f"sizes are {', '.join(f'{size:g}' for size in ordered)}; every size may appear once")
    return ordered

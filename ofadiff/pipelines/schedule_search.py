"""Finds which size each denoising step needs: measures what every size does to the images at every step, and solves."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ofadiff.pipelines.calls import Arguments, check_calls, opened, without_bar
from ofadiff.pipelines.ofa_pipeline import OFAPipeline
from ofadiff.pipelines.steps import step_reader
from ofadiff.reading.arguments import check_choice, check_dict, check_seed, check_whole
from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.size_schedule import SizeSchedule

UNITS = ("macs", "latency", "evaluations")

# Steps on either side with which a step's measured error is averaged, to be solved for beside the error as it is: few
# images say little about a single early step.
SMOOTHING = (0, 1, 2)


@dataclass
class _Steps:
    """What a pipeline's steps cost.

    Attributes:
        count: Steps of the scheduler.
        forwards: Step and denoiser of every forward; an image-to-image call leaves steps out.
        of_forward: What one forward of each denoiser costs, for every size.
        visited: Steps that have forwards.
        spent: What the forwards of each of these cost, for every size.
        largest: What the call costs at the largest size.
        costs: The same at every size, as a share of that.
    """

    count: int
    forwards: Sequence[tuple[int, str]]
    of_forward: Mapping[str, Mapping[float, float]]
    visited: list[int] = field(init=False)
    spent: dict[int, dict[float, float]] = field(init=False)
    largest: float = field(init=False)
    costs: dict[float, float] = field(init=False)

    def __post_init__(self) -> None:
        sizes = sorted({size for costs in self.of_forward.values() for size in costs})
        self.visited = sorted({step for step, _ in self.forwards})
        self.spent = {
            step: {size: sum(self.of_forward[name][size] for at, name in self.forwards if at == step) for size in sizes}
            for step in self.visited
        }
        self.largest = sum(spent[sizes[-1]] for spent in self.spent.values())
        self.costs = {size: self.cost([size] * self.count) for size in sizes}

    def cost(self, sizes: Sequence[float]) -> float:
        """What a schedule costs, as a share of the largest size."""
        return sum(self.spent[step][sizes[step]] for step in self.visited) / self.largest


def find_schedule(
    pipeline: OFAPipeline,
    calls: Sequence[str | Mapping[str, Any]],
    budget: float,
    num_inference_steps: int | None = None,
    *,
    unit: str = "macs",
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SizeSchedule:
    """Finds the schedule of sizes whose images are nearest to the largest size's, for what its steps may cost.

    Every call is sampled at the largest size, and with one step at a smaller size, for each step and size in turn. The
    squared distances of the images, added up over steps, are minimised under the budget, exactly, as they are and
    averaged over neighbouring steps; of the schedules found so, and of those that change once from one size to
    another, the best on these calls is kept. Calls with other noise then tell how good it is. Takes about
    `steps * (sizes - 1)` samplings of every call.

    Args:
        pipeline: With the scheduler that the schedule is for.
        calls: Prompts, or dicts of arguments of the pipeline's own call; some eight or more.
        budget: What a forward may cost on average, as a share of the largest size's, in (0, 1]; of `"evaluations"` how
            many forwards of the largest size a call may cost.
        num_inference_steps: Steps of every call; by default the pipeline's own number, or that of `arguments`.
        unit: Of the cost: `"macs"`, `"latency"` as measured in the calls on this machine, or `"evaluations"`, the
            number of forwards of the largest size that have as many MACs together.
        arguments: Arguments of all calls that do not have their own.
        seed: Of the noise.
        progress: Show a bar.

    Returns:
        The schedule. Its `measured` has `cost`, as a share of the largest size's, and the same in `evaluations`;
        `distance`, the mean squared distance of its images to the largest size's, on other noise than it was found
        with; `constant_distance`, that of a constant size of the same cost (between two sizes, interpolated in the
        logarithm); `ratio`, the one by the other; and `constants`, cost and distance of every size.

    Raises:
        ValueError: If the budget is less than the smallest size costs, a call or the unit cannot be, the pipeline has
            one size alone, MACs were not counted, or images are not finite.

    Example:
        >>> pipeline = OFAPipeline.from_pretrained("ofa")
        >>> schedule = find_schedule(pipeline, [{"batch_size": 2}], budget=0.8, num_inference_steps=3)
        >>> pipeline.set_schedule("fast", schedule)
        >>> images = pipeline(size="fast", num_inference_steps=3).images
    """
    _check_asked(pipeline, budget, unit)
    _check_calling(num_inference_steps, arguments, seed)
    budget = float(budget)
    steps_of_all = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    shared = {**(arguments or {}), **steps_of_all}
    checked = [opened(call) for call in check_calls(pipeline._stock_class, calls, shared)]
    for number, call in enumerate(checked, 1):
        if call.get("generator") is not None:  # it would go on from one sampling to the next
            raise ValueError(f"call {number} has a generator; every schedule needs the same noise, which seed gives")
    bar = tqdm(desc="Schedule", unit="image", disable=not progress)
    search = _Search(pipeline, checked, seed, bar)
    with without_bar(pipeline), bar:
        sizes = pipeline.sizes
        steps = search.measure_steps(unit)
        asked, made = budget, len(steps.forwards)
        if unit == "evaluations":
            if budget > made:
                raise ValueError(f"budget is {budget:g} evaluations, and a call has {made}; give at most that")
            budget = budget / made
        _check_budget(steps.costs, budget)
        bar.total = (len(steps.visited) * (len(sizes) - 1) + 8 + 2 * len(sizes)) * len(checked)
        errors = {
            (step, size): search.distance([size if each == step else sizes[-1] for each in range(steps.count)])
            for step in steps.visited
            for size in sizes[:-1]
        }
        candidates = list(_candidates(errors, steps, budget))
        best = min(candidates, key=search.distance)
        found = _judge(search.with_other_noise(), best, steps)
        found["evaluations"] = found["cost"] * made
    told = {"unit": unit, "budget": asked, "steps": steps.count, "calls": len(checked)}
    return SizeSchedule(best, {**told, **found})


def _check_calling(num_inference_steps: Any, arguments: Any, seed: Any) -> None:
    """Raises ValueError for what no call of a pipeline can be made with."""
    if num_inference_steps is not None:
        check_whole("num_inference_steps", num_inference_steps, 1)
    check_dict("arguments", arguments)
    check_seed("seed", seed)


def _check_asked(pipeline: OFAPipeline, budget: float, unit: str) -> None:
    """Raises ValueError if there can be no schedule of such a budget."""
    check_choice("unit", unit, UNITS)
    number = is_number(budget) and budget > 0
    if unit == "evaluations" and not number:
        raise ValueError(f"budget is {shown(budget)}; it must be a number of evaluations above 0")
    if unit != "evaluations" and not (number and budget <= 1):
        raise ValueError(
            f"budget is {shown(budget)}; it must be above 0 and at most 1, a share of the largest size's cost"
        )
    if not isinstance(pipeline, OFAPipeline):
        raise ValueError(
            f"the pipeline, of {type(pipeline).__name__}, has no sizes; pass what OFAPipeline.from_pretrained returned "
            "without size="
        )
    if not pipeline.supernets or len(pipeline.sizes) < 2:
        raise ValueError("the pipeline has one size alone, of which there is no schedule; load it without size=")
    if unit == "macs":
        shares = [{size: own / max(macs.values()) for size, own in macs.items()} for macs in _macs(pipeline).values()]
        _check_budget({size: min(share[size] for share in shares) for size in pipeline.sizes}, budget)


def _macs(pipeline: OFAPipeline) -> dict[str, dict[float, float]]:
    """MACs of a forward of each denoiser at each size."""
    macs: dict[str, dict[float, float]] = {}
    for name, supernet in pipeline.supernets.items():
        macs[name] = {}
        for size in pipeline.sizes:
            counted = supernet.subnets.find(size).macs
            if counted is None:
                raise ValueError("the MACs of these sizes were not counted; give unit='latency'")
            macs[name][size] = counted
    return macs


def _check_budget(costs: Mapping[float, float], budget: float) -> None:
    smallest = min(costs, key=costs.__getitem__)
    if costs[smallest] > budget:
        raise ValueError(
            f"budget is {budget:g}, and the cheapest size, {smallest:g}, costs {costs[smallest]:.3f} of the largest at "
            "every step; give at least that"
        )


class _Search:
    """Samples calls with schedules, always with the same noise, and compares them with the largest size's images."""

    def __init__(self, pipeline: OFAPipeline, calls: Sequence[Arguments], seed: int, bar: Any, noise: str = "") -> None:
        self.pipeline, self.calls, self.seed, self.bar, self.noise = pipeline, calls, seed, bar, noise
        self.takes = inspect.signature(pipeline._stock_class.__call__).parameters
        self.known: dict[tuple[float, ...], float] = {}
        self.expected: list[np.ndarray] | None = None

    def with_other_noise(self) -> _Search:
        """The same calls, begun from other noise."""
        return _Search(self.pipeline, self.calls, self.seed, self.bar, "other ")

    def sample(self, size: float | SizeSchedule, calls: int | None = None) -> list[np.ndarray]:
        """The images of every call, or of the first ones."""
        images = []
        with torch.random.fork_rng():
            for number, call in enumerate(self.calls[:calls]):
                drawn = random.Random(f"{self.seed} {self.noise}noise of call {number}").getrandbits(63)
                torch.manual_seed(drawn)
                options = {"output_type": "np"} if "output_type" in self.takes else {}
                if "generator" in self.takes:
                    options["generator"] = torch.Generator().manual_seed(drawn)
                with in_one_sentence(f"call {number + 1} cannot be made of the {type(self.pipeline).__name__}"):
                    output = self.pipeline(**{**options, **call}, size=size)  # type: ignore[operator]
                images.append(_numbers(output[0]))
                self.bar.update()
        return images

    def distance(self, sizes: Sequence[float]) -> float:
        """Mean squared distance of the images of a schedule to the largest size's."""
        key = tuple(sizes)
        if key not in self.known:
            if self.expected is None:
                self.expected = self.sample(self.pipeline.sizes[-1])
            images = self.sample(SizeSchedule(sizes))
            pairs = zip(images, self.expected, strict=True)
            distance = statistics.fmean(float(np.square(one - other).mean()) for one, other in pairs)
            if not math.isfinite(distance):
                raise ValueError(
                    f"the images of {SizeSchedule(sizes)} or of the largest size have values that are not finite, so "
                    "they cannot be compared; check the model and its dtype"
                )
            self.known[key] = distance
        return self.known[key]

    def measure_steps(self, unit: str) -> _Steps:
        """Which steps the first call takes, and what each size costs."""
        pipeline = self.pipeline
        with _watched(pipeline) as seen:
            self.sample(pipeline.sizes[-1], calls=1)
        if not seen.forwards:
            raise ValueError(f"the {type(pipeline).__name__} never called its denoiser, so it has no steps")
        return _Steps(seen.count, seen.forwards, self._latencies() if unit == "latency" else _macs(pipeline))

    def _latencies(self) -> dict[str, dict[float, float]]:
        """Seconds of a forward of each denoiser at each size: the median of two calls, sizes in turn."""
        seconds: dict[str, dict[float, list[float]]] = {}
        for size in (*self.pipeline.sizes, *self.pipeline.sizes):
            with _watched(self.pipeline) as seen:
                self.sample(size, calls=1)
            for name in {called for _, called in seen.forwards}:
                own = [took for (_, called), took in zip(seen.forwards, seen.seconds, strict=True) if called == name]
                seconds.setdefault(name, {}).setdefault(size, []).extend(own[1:] or own)
        return {name: {size: statistics.median(own) for size, own in sizes.items()} for name, sizes in seconds.items()}


class _Seen:
    """Step, denoiser and seconds of the forwards of a call."""

    def __init__(self) -> None:
        self.forwards: list[tuple[int, str]] = []
        self.seconds: list[float] = []
        self.count, self.began = 0, 0.0


@contextmanager
def _watched(pipeline: Any) -> Iterator[_Seen]:
    """A block in which forwards of a pipeline's denoisers are counted and timed."""
    seen = _Seen()
    handles = []

    def synchronize(device: torch.device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    for name in pipeline.supernets:
        denoiser = pipeline.components[name]
        read = step_reader(pipeline, name)

        def begin(module: Any, args: tuple, kwargs: dict[str, Any], read: Any = read, name: str = name) -> None:
            step, seen.count = read(args, kwargs)
            seen.forwards.append((step, name))
            synchronize(pipeline._execution_device)
            seen.began = time.perf_counter()

        def end(*call: Any) -> None:
            synchronize(pipeline._execution_device)
            seen.seconds.append(time.perf_counter() - seen.began)

        handles += [denoiser.register_forward_pre_hook(begin, with_kwargs=True), denoiser.register_forward_hook(end)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _numbers(output: Any) -> np.ndarray:
    """Images, frames or sounds as one array of floats."""
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu().numpy().astype(np.float64)
    if isinstance(output, (list, tuple)):
        return np.concatenate([_numbers(each).ravel() for each in output])
    values = np.asarray(output)
    return values.astype(np.float64) / (255 if values.dtype == np.uint8 else 1)


# Which schedule


def _candidates(errors: Mapping[tuple[int, float], float], steps: _Steps, budget: float) -> Iterator[list[float]]:
    """Schedules that may be the best within a budget."""
    sizes = sorted(steps.costs)
    yield from _one_change(steps, budget, sizes)
    for reach in SMOOTHING:
        smooth = {
            (step, size): statistics.fmean(
                errors[near, size] for near in range(step - reach, step + reach + 1) if (near, size) in errors
            )
            for step, size in errors
        }
        chosen = best_sizes(
            [{**{size: smooth[step, size] for size in sizes[:-1]}, sizes[-1]: 0.0} for step in steps.visited],
            [steps.spent[step] for step in steps.visited],
            budget * steps.largest,
        )
        yield _filled(steps, chosen)


def _one_change(steps: _Steps, budget: float, sizes: Sequence[float]) -> Iterator[list[float]]:
    """For every two sizes the schedules that change once, either way, as late or as early as the budget allows."""
    constant = max((size for size in sizes if steps.costs[size] <= budget), key=steps.costs.__getitem__)
    yield [constant] * steps.count
    for small, large in itertools.combinations(sizes, 2):
        if not steps.costs[small] <= budget < steps.costs[large]:
            continue
        for largest_first in (False, True):
            fitting = []
            for changed in range(len(steps.visited) + 1):
                few = [large] * changed if largest_first else [small] * (len(steps.visited) - changed)
                rest = small if largest_first else large
                filled = _filled(steps, [*few, *[rest] * (len(steps.visited) - len(few))])
                if steps.cost(filled) <= budget:
                    fitting.append(filled)
            yield max(fitting, key=steps.cost)


def _filled(steps: _Steps, chosen: Sequence[float]) -> list[float]:
    """Sizes of the visited steps for all: those left out have the size of the nearest one."""
    return [
        chosen[min(range(len(steps.visited)), key=lambda place: abs(steps.visited[place] - step))]
        for step in range(steps.count)
    ]


def best_sizes(
    errors: Sequence[Mapping[float, float]], costs: Sequence[Mapping[float, float]], budget: float
) -> list[float]:
    """For every step a size, with the least sum of errors whose costs add up to no more than a budget.

    Exact, by dynamic programming over steps: of all beginnings those are kept that no other one undercuts in both.

    Args:
        errors: Of each size, for every step.
        costs: Likewise.
        budget: Sum of costs.

    Raises:
        ValueError: If even the cheapest sizes cost more.
    """
    ends: list[tuple[float, float, tuple[float, ...]]] = [(0.0, 0.0, ())]
    left = [sum(min(each.values()) for each in costs[step:]) for step in range(len(costs) + 1)]
    slack = 1e-9 * budget
    for step, (own_errors, own_costs) in enumerate(zip(errors, costs, strict=True), 1):
        longer = [
            (spent + own_costs[size], error + own_errors[size], (*chosen, size))
            for spent, error, chosen in ends
            for size in own_errors
            if spent + own_costs[size] + left[step] <= budget + slack
        ]
        ends, least = [], math.inf
        for end in sorted(longer):
            if end[1] < least:
                ends.append(end)
                least = end[1]
    if not ends:
        raise ValueError(f"the budget of {budget:g} is less than the cheapest sizes cost")
    return list(ends[-1][2])


# How good it is


def _judge(search: _Search, sizes: Sequence[float], steps: _Steps) -> dict[str, Any]:
    """A schedule beside constant sizes, on noise that it was not found with."""
    constants = sorted((steps.costs[size], search.distance([size] * steps.count), size) for size in steps.costs)
    cost, distance = steps.cost(sizes), search.distance(sizes)
    constant = _between([(own, far) for own, far, _ in constants], cost)
    return {
        "cost": cost,
        "distance": distance,
        "constant_distance": constant,
        "ratio": distance / constant if constant > 0 else 1.0,
        "constants": {f"{size:g}": {"cost": own, "distance": far} for own, far, size in constants},
    }


def _between(points: Sequence[tuple[float, float]], cost: float) -> float:
    """The distance at a cost: between two sizes, interpolated in its logarithm; to the largest size, linearly."""
    for (low, far), (high, near) in itertools.pairwise(points):
        if low <= cost <= high:
            share = (cost - low) / (high - low) if high > low else 0.0
            if near > 0 and far > 0:
                return math.exp((1 - share) * math.log(far) + share * math.log(near))
            return (1 - share) * far + share * near
    return points[-1][1]

"""Sizes over the steps of one image: the early steps at one size, the late ones at another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from ofadiff.reading.arguments import check_argument
from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number
from ofadiff.sizes import SizeTable


@dataclass(frozen=True)
class SizeSchedule(Sequence[float]):
    """The size of every denoising step, from pure noise to the image.

    A pipeline that samples in another number of steps than the schedule has takes, at each of its steps, the size that
    the schedule has at the same share of the way. An image-to-image pipeline, which begins in the middle, begins in the
    middle of the schedule.

    Args:
        sizes: A size for each step, first the one at the most noise; of a checkpoint's sizes.
        measured: What is known of it, such as `find_schedule` found out: JSON values by name.

    Raises:
        ValueError: If there is no size, one is no number above 0, or `measured` is no JSON.

    Example:
        >>> pipeline = OFAPipeline.from_pretrained("ofa")
        >>> schedule = SizeSchedule([0.5] * 3 + [1.0] * 2)
        >>> images = pipeline(size=schedule, num_inference_steps=5).images
        >>> schedule.over(10)
        SizeSchedule(0.5 × 6, 1 × 4)
    """

    sizes: tuple[float, ...]
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(self, sizes: Iterable[float], measured: Mapping[str, Any] | None = None) -> None:
        one = isinstance(sizes, (str, bytes, torch.Tensor)) or not isinstance(sizes, Iterable)
        values: list[Any] = [sizes] if one else list(sizes)
        if not values:
            raise ValueError("sizes is empty; a schedule needs the size of at least one step")
        for value in values:
            if not (is_number(value) and value > 0):
                raise ValueError(f"sizes has {shown(value)}; a schedule takes numbers above 0, sizes of a checkpoint")
        told = {} if measured is None else measured
        check_argument("measured", told, isinstance(told, Mapping), "a dict, or None")
        try:
            json.dumps(dict(told), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"measured cannot be kept as JSON: {error}") from None
        object.__setattr__(self, "sizes", tuple(float(value) for value in values))
        object.__setattr__(self, "measured", dict(told))

    def to_dict(self) -> dict[str, Any]:
        """As `ofa_config.json` keeps it."""
        return {"sizes": list(self.sizes), "measured": dict(self.measured)}

    @classmethod
    def from_dict(cls, values: Any) -> SizeSchedule:
        """What `to_dict` gave.

        Raises:
            ValueError: If it is something else.
        """
        if not (isinstance(values, Mapping) and isinstance(values.get("sizes"), list)):
            raise ValueError(f"a schedule is {shown(values)}; it must be an object with a list of sizes")
        measured = values.get("measured")
        return cls(values["sizes"], measured if isinstance(measured, Mapping) else None)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[float]:
        return iter(self.sizes)

    def __getitem__(self, step: Any) -> Any:
        return self.sizes[step]

    def over(self, steps: int) -> SizeSchedule:
        """The schedule for another number of steps: each has the size of the step at the same share of the way.

        Raises:
            ValueError: If there are fewer than one step.
        """
        if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps is {shown(steps)}; it must be a whole number of at least 1")
        return SizeSchedule([self.at(step, steps) for step in range(steps)], self.measured)

    def at(self, step: int, steps: int) -> float:
        """The size of a step, from 0 on, of so many; its middle decides, so that halves stay halves."""
        return self.sizes[min(int((step + 0.5) * len(self) / steps), len(self) - 1)]

    def __repr__(self) -> str:
        runs: list[list[Any]] = []
        for size in self.sizes:
            if runs and runs[-1][0] == size:
                runs[-1][1] += 1
            else:
                runs.append([size, 1])
        return "SizeSchedule(" + ", ".join(f"{size:g} × {count}" for size, count in runs) + ")"


def check_schedule(subnets: SizeTable, name: str, schedule: SizeSchedule | None) -> None:
    """Raises ValueError if a schedule is none, cannot be kept under a name, or has sizes that are not in a table."""
    if schedule is not None and not isinstance(schedule, SizeSchedule):
        raise ValueError(f"the schedule is {shown(schedule)}; it must be a SizeSchedule, or None to take one away")
    if not isinstance(name, str) or not name or name in ("smallest", "largest"):
        raise ValueError(
            f"a schedule cannot have the name {name!r}; give it a word other than 'smallest' and 'largest'"
        )
    for size in dict.fromkeys(schedule or ()):
        subnets.find(size)

"""The widths that a group may have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ofadiff.channels import ChannelGroup

# With min_keep=0 a group keeps nothing or at least this: what equation 5 puts below its own floor is dropped.
DROP_BELOW = 0.25

# A group whose aligned widths would be fewer than this takes finer steps: alignment must not make it rigid.
MIN_STEPS = 4


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

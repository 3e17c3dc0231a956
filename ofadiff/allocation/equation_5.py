"""How equation 5 shares a block's channels out among its layers.

Equation 5 keeps C_l = max(min(Î_l · K_B · P · |l|, |l|), P0 · |l|) of layer l, where Î_l is the layer's share of the
importance in its block B, K_B the number of layers there, P the retention rate and P0 its floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ofadiff.channels import ChannelGroup


def importance_shares(
    groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], by_kind: bool
) -> dict[str, float]:
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


def paper_widths(
    groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], P: float, P_0: float
) -> dict[str, int]:
    """Equation 5 as printed, rounded to whole units. P = 1 is the full model."""
    shares = importance_shares(groups, scores, by_kind=False)
    widths = {}
    for group in groups:
        kept = max(min(shares[group.name] * P * group.width, group.width), P_0 * group.width)
        widths[group.name] = group.width if P == 1 else max(0 if group.droppable else 1, round(kept))
    return widths


def ordered_steps(
    groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], ladders: Mapping[str, list[int]]
) -> list[tuple[str, int]]:
    """Every step (group, position on its ladder), in the order in which a growing P reaches it."""
    shares = importance_shares(groups, scores, by_kind=True)
    reached = []
    for index, group in enumerate(groups):
        for rung in range(1, len(ladders[group.name])):
            width = ladders[group.name][rung]
            P = width / (shares[group.name] * group.width) if shares[group.name] > 0 else math.inf
            reached.append((P, width / group.width, index, rung))
    return [(groups[index].name, rung) for _, _, index, rung in sorted(reached)]

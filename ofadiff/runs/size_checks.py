"""Whether sizes can be met, before any weight is loaded."""

from __future__ import annotations

import warnings

import torch
from diffusers import ModelMixin

from ofadiff.allocation.allocation import allocate, allocate_costs
from ofadiff.denoisers.inputs import Inputs
from ofadiff.profiling.cost import UnitCosts, count_parameters, unit_parameters
from ofadiff.profiling.latency import LatencyCosts
from ofadiff.runs.settings import Compression
from ofadiff.sizes import SizeTable
from ofadiff.unet_elastic import find_channel_groups


def check_sizes(
    compression: Compression,
    denoiser: ModelMixin,
    latencies: LatencyCosts | None = None,
    inputs: Inputs | None = None,
    counted: bool = True,
) -> SizeTable:
    """The sizes, as far as they are known before scores are: their widths are not.

    Args:
        compression: What is asked for.
        denoiser: Its weights do not matter, so it may be on the meta device.
        latencies: Which sizes in latency can be met is known once it is measured.
        inputs: What MACs are counted on, see `allocate`.
        counted: Whether that is known yet.

    Raises:
        ValueError: Unless the sizes can be met, and the options fit what was chosen.
    """
    compression.criterion_options()
    compression.strategy_options()
    groups = find_channel_groups(denoiser)
    alike = {group.name: torch.ones(group.width) for group in groups}
    unknown = compression.budget == "latency" and latencies is None
    unknown |= compression.budget == "macs" and not counted
    sizes, budget = ((1.0,), "params") if unknown else (compression.sizes, compression.budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is missed depends on the scores, which come later
        if not counted:
            costs = UnitCosts(count_parameters(denoiser), None, unit_parameters(denoiser, groups), {})
            return allocate_costs(groups, alike, costs, sizes, budget, compression.min_keep)
        which = denoiser, groups, alike, sizes, budget, compression.min_keep
        return allocate(*which, inputs=inputs, latencies=latencies)

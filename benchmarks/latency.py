"""Extracted models against the full one: the time ratio beside the ratio of MACs.

Also what aligned widths are worth, and branches dropped at the same number of parameters.

python benchmarks/latency.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from denoisers import make_denoiser, make_supernet, random_batch
from side_by_side import Comparison, main

from ofadiff.training.losses import predict

SIZES = (0.4, 0.6, 0.8, 1.0)
BATCH_SIZES = {"cpu": (1,), "cuda": (4, 16)}

# Unevenness of the branches' importance that makes sizes differ in depth more than in width.
DEPTH = 1.0

# Of the time ratio over the ratio of MACs.
MAX_TIME = 1.15


@torch.no_grad()
def compare(comparison: Comparison) -> None:
    aligned = make_supernet(make_denoiser(comparison), SIZES)
    others = {
        "unaligned": make_supernet(make_denoiser(comparison), SIZES, alignment=1),
        "branches dropped": make_supernet(make_denoiser(comparison), SIZES, min_keep=0, unevenness=DEPTH),
    }
    models = {"full": aligned.extract(SIZES[-1])}
    for size in SIZES[:-1]:
        models[f"{size:g}"] = aligned.extract(size)
        models |= {f"{size:g} {name}": supernet.extract(size) for name, supernet in others.items()}
    for batch_size in (1,) if comparison.quick else BATCH_SIZES[comparison.device.type]:
        batch = random_batch(aligned.model, batch_size)
        times = comparison.time_in_turn({name: partial(predict, model, batch) for name, model in models.items()})
        for subnet in list(aligned.subnets)[:-1]:
            macs = subnet.macs / aligned.subnets.full_macs
            what = f"batch {batch_size}, size {subnet.size:g} with {macs:.3f} of the MACs"
            name = f"{subnet.size:g}"
            comparison.add_times(f"{what}: extracted, full", times[name], times["full"], MAX_TIME * macs)
            comparison.add_times(f"{what}: aligned, unaligned", times[name], times[f"{name} unaligned"])
            dropping = others["branches dropped"].subnets.find(subnet.size)
            comparison.add_times(
                f"{what}, or {dropping.macs / aligned.subnets.full_macs:.3f} with {len(dropping.dropped)} of "
                f"{len(dropping.widths)} branches dropped: dropped, width alone",
                times[f"{name} branches dropped"],
                times[name],
            )


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

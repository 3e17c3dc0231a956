"""What a switch of size costs: `set_size`, the first call after it, and memory after ten thousand of them.

python benchmarks/switch.py
"""

from __future__ import annotations

import itertools
import sys
import tracemalloc

import torch
from denoisers import SHAPES, make_denoiser, make_supernet, random_batch
from diffusers import UNet2DConditionModel
from side_by_side import Comparison, main

from ofadiff import Supernet
from ofadiff.training.losses import predict

SIZES = (0.4, 0.7, 1.0)
MAX_SECONDS = 1e-3
SWITCHES = 10_000

# In bytes. If every switch left one small object behind, it would be ten times as much.
MAX_GROWTH = 64 * 2**10


def compare(comparison: Comparison) -> None:
    # Switching reads no weights, so that the real groups need none.
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**SHAPES["quick" if comparison.quick else "cuda"])
    real = make_supernet(denoiser, SIZES, criterion="random")
    sizes = itertools.cycle(real.sizes)
    times = comparison.time_in_turn({"set_size": lambda: real.set_size(next(sizes))}, calls=30)
    comparison.add_time_limit(
        f"set_size of {len(real.groups)} groups (Stable Diffusion 1.5's), the limit", times["set_size"], MAX_SECONDS
    )
    compare_first_call(comparison)
    compare_growth(comparison, real)


@torch.no_grad()
def compare_first_call(comparison: Comparison) -> None:
    supernet = make_supernet(make_denoiser(comparison), SIZES)
    batch = random_batch(supernet.model, 1)

    def first_call() -> None:
        supernet.set_size("largest")
        supernet.set_size("smallest")
        predict(supernet.model, batch)

    supernet.set_size("smallest")
    times = comparison.time_in_turn({"first": first_call, "another": lambda: predict(supernet.model, batch)})
    comparison.add_times("two switches and the first call after them, another call", times["first"], times["another"])


def compare_growth(comparison: Comparison, supernet: Supernet) -> None:
    switches = 200 if comparison.quick else SWITCHES
    sizes = itertools.cycle(supernet.sizes)
    tracemalloc.start()
    before = 0
    for number in range(2 * len(supernet.sizes) + switches):
        if number == 2 * len(supernet.sizes):
            before = held_bytes()
        supernet.set_size(next(sizes))
    growth = held_bytes() - before
    tracemalloc.stop()
    comparison.add_memory(f"growth over {switches} switches, the limit", growth, MAX_GROWTH, 1.0)


def held_bytes() -> int:
    """What Python and PyTorch on a GPU hold."""
    return tracemalloc.get_traced_memory()[0] + (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

"""An elastic model against the untouched one at full size, and against the extracted one at each other size.

python benchmarks/elastic_overhead.py
"""

from __future__ import annotations

import copy
import sys
from functools import partial

import torch
from denoisers import make_denoiser, make_supernet, random_batch
from side_by_side import Comparison, main
from torch import nn

from ofadiff.denoisers.prepare import DenoiserInputs
from ofadiff.layers import cut_once
from ofadiff.training.losses import predict, prediction_loss

SIZES = (0.4, 0.7, 1.0)
# A step of training. Gradients have the full model's size at every size: writing their zeros takes the same time for
# any batch.
BATCH_SIZES = {"cpu": 8, "cuda": 8}
MAX_TIME_FULL, MAX_TIME, MAX_TIME_SAMPLING, MAX_MEMORY = 1.02, 1.08, 1.03, 1.05
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def compare(comparison: Comparison) -> None:
    elastic = make_denoiser(comparison)
    batch = random_batch(elastic, 2 if comparison.quick else BATCH_SIZES[comparison.device.type])
    untouched = copy.deepcopy(elastic)
    supernet = make_supernet(elastic, SIZES)
    for size in reversed(supernet.sizes):
        supernet.set_size(size)
        full = size == supernet.sizes[-1]
        other, name = (untouched, "untouched") if full else (supernet.extract(size), "extracted")
        sides = {"elastic": elastic, name: other}
        for bound, label, step in (
            (MAX_TIME_FULL if full else MAX_TIME, "forward and backward", gradients),
            (MAX_TIME_FULL if full else MAX_TIME_SAMPLING, "forward", sample),
        ):
            steps = {side: partial(step, model, batch) for side, model in sides.items()}
            # As a pipeline samples: the weights stay what they are for many steps.
            with cut_once():
                times = comparison.time_in_turn(steps)
            what = f"{label} at {size:g}: elastic, {name}"
            comparison.add_times(f"time: {what}", times["elastic"], times[name], bound)
            # The full weights, and their gradients, are there at every size; what counts is the rest.
            held = 1 if step is sample else 2
            ours, theirs = (
                comparison.peak_memory([model], steps[side]) - held * weight_bytes(model)
                for side, model in sides.items()
            )
            comparison.add_memory(f"activations: {what}", ours, theirs, MAX_MEMORY)
        with torch.no_grad():
            ours, theirs = predict(elastic, batch), predict(other, batch)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        comparison.add_error(f"largest relative difference at {size:g}", error, MAX_ERROR[comparison.dtype])


def gradients(model: nn.Module, batch: DenoiserInputs) -> None:
    prediction_loss(predict(model, batch), batch).mean().backward()
    model.zero_grad()


@torch.no_grad()
def sample(model: nn.Module, batch: DenoiserInputs) -> None:
    predict(model, batch)


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

"""Exact Taylor scores from batched passes over activations, against one sample at a time with weight gradients.

python benchmarks/importance.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from denoisers import make_denoiser, random_batch
from side_by_side import Comparison, main
from torch import nn

from ofadiff import find_channel_groups, score_channels
from ofadiff.channels import ChannelGroup
from ofadiff.denoisers.prepare import DenoiserInputs
from ofadiff.importance.matrices import scored_slices
from ofadiff.training.losses import predict, prediction_loss

# Samples of the 1024 that the method takes; both sides grow with them alike.
BATCH_SIZES = {"cpu": 8, "cuda": 32}
MAX_TIME = {"cpu": 1 / 1.6, "cuda": 1 / 10}


def compare(comparison: Comparison) -> None:
    batch_size = 2 if comparison.quick else BATCH_SIZES[comparison.device.type]
    model = make_denoiser(comparison)
    groups = find_channel_groups(model)
    batch = random_batch(model, batch_size)

    def batched() -> dict[str, torch.Tensor]:
        return score_channels(model, groups, [batch], loss_fn)

    def one_at_a_time() -> dict[str, torch.Tensor]:
        return scores_one_at_a_time(model, groups, batch)

    def training_step() -> None:
        loss_fn(model, batch).mean().backward()
        model.zero_grad()

    times = comparison.time_in_turn({"batched": batched, "one": one_at_a_time})
    comparison.add_times(
        f"time of {batch_size} samples: batched, one at a time",
        times["batched"],
        times["one"],
        MAX_TIME[comparison.device.type],
    )
    comparison.add_memory(
        f"peak memory: scores of {batch_size} samples, a training step on them without its optimizer",
        comparison.peak_memory([model], batched),
        comparison.peak_memory([model], training_step),
        1.0,
    )
    # Rounding hides nothing in float32 without TF32.
    torch.backends.cudnn.allow_tf32 = False
    model.float()
    exact, expected = batched(), one_at_a_time()
    errors = [float((exact[name].to(value) - value).abs().max() / value.max()) for name, value in expected.items()]
    comparison.add_error("scores: largest relative difference in float32", max(errors), 1e-4)


def loss_fn(model: nn.Module, inputs: DenoiserInputs) -> torch.Tensor:
    return prediction_loss(predict(model, inputs), inputs)


def scores_one_at_a_time(
    model: nn.Module, groups: Sequence[ChannelGroup], batch: DenoiserInputs
) -> dict[str, torch.Tensor]:
    """Equation 4 as it is written: w · ∂L_n/∂w of one sample after the other."""
    samples = len(batch.target)
    total = {group.name: torch.zeros(group.width, device=batch.target.device) for group in groups}
    for n in range(samples):
        arguments = {name: value[n : n + 1] for name, value in batch.arguments.items()}
        loss_fn(model, DenoiserInputs(arguments, batch.target[n : n + 1], batch.weight[n : n + 1])).sum().backward()
        for group in groups:
            for part in scored_slices(model, group):
                weight = model.get_submodule(part.module).weight
                products = weight.detach() * weight.grad
                rows = products if part.axis == "out" else products.transpose(0, 1)
                total[group.name] += part.per_unit(rows.flatten(1).sum(1, dtype=torch.float32).abs())
        model.zero_grad()
    return {name: value / samples for name, value in total.items()}


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

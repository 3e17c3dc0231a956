"""A step of joint training with a teacher, against a plain fine-tuning step.

python benchmarks/training.py
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from denoisers import make_denoiser, make_supernet, random_batch
from side_by_side import Comparison, main
from torch import nn

from ofadiff import Supernet
from ofadiff.denoisers.prepare import DenoiserInputs
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.muon import Muon, split_weights

SIZES = (0.4, 0.7, 1.0)
BATCH_SIZES = {"cpu": 2, "cuda": 16}
MAX_MEMORY = 1.1
LEARNING_RATE = 1e-6


def compare(comparison: Comparison) -> None:
    # As the recipes train: float32 weights, and bfloat16 by autocast where it is fast.
    plain = make_denoiser(comparison, torch.float32)
    teacher = copy.deepcopy(plain).requires_grad_(False)
    supernet = make_supernet(copy.deepcopy(plain), SIZES)
    stages = tuple(dict.fromkeys(group.stage for group in supernet.groups))
    batch = random_batch(plain, 2 if comparison.quick else BATCH_SIZES[comparison.device.type])
    plain.train()
    supernet.model.train()

    joint_optimizer, optimizer = (torch.optim.AdamW(m.parameters(), LEARNING_RATE) for m in (supernet.model, plain))
    muon = Muon(*(part.values() for part in split_weights(supernet.model, supernet.groups)), lr=LEARNING_RATE)

    def joint(
        size: float, stages: Sequence[str] = (), optimizer: torch.optim.Optimizer = joint_optimizer
    ) -> Callable[[], None]:
        return partial(joint_step, supernet, size, teacher, stages, batch, optimizer)

    joint_steps = {f"{size:g}": joint(size) for size in reversed(supernet.sizes)}
    with_features = {f"{supernet.sizes[-1]:g}, block outputs too": joint(supernet.sizes[-1], stages)}
    with_muon = {f"{size:g}, Muon": joint(size, optimizer=muon) for size in reversed(supernet.sizes)}
    steps = {**joint_steps, **with_features, **with_muon, "plain": partial(plain_step, plain, batch, optimizer)}
    with torch.autocast(comparison.device.type, torch.bfloat16, enabled=comparison.device.type == "cuda"):
        times = comparison.time_in_turn(steps)
        teacher_bytes = sum(parameter.nbytes for parameter in teacher.parameters())
        theirs = comparison.peak_memory([plain], steps["plain"]) + teacher_bytes
        for name in {**joint_steps, **with_features}:
            ours = comparison.peak_memory([supernet.model, teacher], steps[name])
            comparison.add_times(f"time: joint step at {name}, plain step", times[name], times["plain"])
            comparison.add_memory(f"memory: joint step at {name}, plain step and teacher", ours, theirs, MAX_MEMORY)
    for name in joint_steps:
        comparison.add_times(f"time: joint step at {name} with Muon, with AdamW", times[f"{name}, Muon"], times[name])
    for larger, smaller in itertools.pairwise(joint_steps):
        comparison.add_times(f"time: joint step at {smaller}, at {larger}", times[smaller], times[larger], 1.0)


def joint_step(
    supernet: Supernet,
    size: float,
    teacher: nn.Module,
    stages: Sequence[str],
    batch: DenoiserInputs,
    optimizer: torch.optim.Optimizer,
) -> None:
    """A step of `ofadiff.training.train`."""
    supernet.set_size(size)
    with block_outputs(supernet.model, stages) as features:
        prediction = predict(supernet.model, batch)
    loss = prediction_loss(prediction, batch)
    loss = loss + distillation_loss(teacher, batch, prediction, features, 1.0, 1.0)
    descend(loss, optimizer)


def plain_step(model: nn.Module, batch: DenoiserInputs, optimizer: torch.optim.Optimizer) -> None:
    descend(prediction_loss(predict(model, batch), batch), optimizer)


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.mean().backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

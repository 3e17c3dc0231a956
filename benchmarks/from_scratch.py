"""Training of small models from scratch, for benchmarks that may not download any."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import trange


def train_from_scratch(
    model: nn.Module,
    loss_fn: Callable[[Sequence[int]], Tensor],
    items: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float = 0.995,
    seed: int = 0,
    name: str,
) -> None:
    """AdamW with warm-up and cosine decay; the model ends with the average of its weights, in eval mode.

    Args:
        model: What is trained, in place.
        loss_fn: Mean loss of a batch of items, given their indices.
        items: How many there are.
        steps: Optimizer steps.
        batch_size: Items per step, from a new order in every epoch.
        learning_rate: Its peak.
        ema_decay: Largest decay of the average.
        seed: Of the order.
        name: What the progress bar says.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=min(100, steps // 10), num_training_steps=steps
    )
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=3 / 4)
    order = endless(items, seed)
    bar = trange(steps, desc=name)
    for _ in bar:
        loss = loss_fn([next(order) for _ in range(batch_size)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(model.parameters())
        bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(model.parameters())
    model.eval()


def endless(items: int, seed: int) -> Iterator[int]:
    """Indices of all items, in a new order each time round."""
    shuffle = random.Random(seed)
    while True:
        yield from shuffle.sample(range(items), items)

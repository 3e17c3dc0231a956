"""Losses on held-out images, of the averaged weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import nn

from ofadiff.denoisers.prepare import Prepare, parts_of
from ofadiff.noise.draws import Batch
from ofadiff.storage.finite import NotFiniteError
from ofadiff.supernet import Supernet
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.sharding import forget_gathered, shard
from ofadiff.training.single_size import SingleSize


def check_finite(loss: float, what: str) -> None:
    """Raises NotFiniteError for a loss that is no number."""
    if not math.isfinite(loss):
        raise NotFiniteError(f"{what} is {loss}; the weights or the inputs are out of range, or so is the precision")


def validation_loss(model: nn.Module, batches: Iterable[Batch], prepare: Prepare, accelerator: Accelerator) -> float:
    """Mean denoising loss over the batches of all processes."""
    return _validation_losses({0.0: nullcontext}, model, batches, prepare, accelerator)[0.0]


def validation_losses(
    supernet: Supernet | SingleSize, batches: Iterable[Batch], prepare: Prepare, accelerator: Accelerator
) -> dict[float, float]:
    """Mean denoising loss of every size over the batches of all processes; each batch is prepared once for all."""
    at_sizes = {size: functools.partial(supernet.at, size) for size in supernet.sizes}
    return _validation_losses(at_sizes, supernet.model, batches, prepare, accelerator)


@torch.no_grad()
def _validation_losses(
    at_sizes: Mapping[float, Callable[[], AbstractContextManager]],
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Prepare,
    accelerator: Accelerator,
) -> dict[float, float]:
    totals = {size: torch.zeros(2, device=accelerator.device) for size in at_sizes}
    for batch in batches:
        parts = parts_of(prepare(send_to_device(batch, accelerator.device)))
        for size, at_size in at_sizes.items():
            with at_size():
                losses = torch.cat([prediction_loss(predict(model, inputs), inputs) for inputs in parts])
            totals[size] += torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=accelerator.device)])
    sums = {size: accelerator.reduce(total, "sum").tolist() for size, total in totals.items()}
    return {size: loss / count for size, (loss, count) in sums.items()}


@contextmanager
def averaged_weights(ema: EMAModel, weights: Sequence[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Gives weights of a model the values of their average for a block."""
    shards = [shard(weight) for weight in weights]
    ema.store(shards)
    ema.copy_to(shards)
    forget_gathered(model)
    try:
        yield
    finally:
        ema.restore(shards)
        forget_gathered(model)

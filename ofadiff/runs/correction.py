"""How a run fits the readers of its sizes before it trains: on its own data, by all processes together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import send_to_device
from torch import nn

from ofadiff.correction import correct_readers
from ofadiff.data.captioned_stream import TextToImageStream
from ofadiff.data.mixed_samples import MixedSamples
from ofadiff.data.order import fixed_batches
from ofadiff.denoisers.prepare import DenoiserInputs, parts_of
from ofadiff.noise.draws import Batch
from ofadiff.runs.run import Run
from ofadiff.supernet import Supernet
from ofadiff.training.layer_by_layer import on_device
from ofadiff.training.losses import predict


def correct(run: Run, supernet: Supernet) -> None:
    """Fits the readers of a new supernet in closed form, in place, see `correct_readers`; on every process.

    Args:
        run: Its `--correction_samples` noisy samples are what the readers are fitted on; with 0 nothing is done.
        supernet: As `Supernet(…)` made it, not trained.

    Raises:
        ValueError: If what a reader reads or gives is not finite.
    """
    accelerator, compression, optimization = run.accelerator, run.settings.compression, run.settings.optimization
    count = compression.correction_samples
    if not count:
        return
    # Where there are fewer samples than processes each looks at all of them.
    alone = count < accelerator.num_processes
    share = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    training = run.data.training
    data = training.first(count) if isinstance(training, TextToImageStream) else training
    data = data.recorded if isinstance(data, MixedSamples) else data
    batch_size = compression.importance_batch_size or optimization.train_batch_size
    batches = fixed_batches(data, count, batch_size, optimization.seed, "correction", *share)
    inputs: Iterable[DenoiserInputs] = _Forwards(run, batches)
    if run.recordings is None:  # images are decoded and encoded once, recordings read from disk again
        inputs = [_on(each, torch.device("cpu")) for each in inputs]
    half = accelerator.mixed_precision == "bf16"
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half)
    with on_device(accelerator, supernet.model), autocast:
        correct_readers(
            supernet,
            inputs,
            functools.partial(_call, device=accelerator.device),
            ridge=compression.correction_ridge,
            adapter_rank=compression.correction_rank or 0,
            seed=optimization.seed,
            reduce=None if alone or accelerator.num_processes == 1 else accelerator.reduce,
            share=share,
            progress=accelerator.is_main_process,
        )


class _Forwards:
    """The inputs of every forward of some batches, one after the other, read again as often as wanted."""

    def __init__(self, run: Run, batches: Iterable[Batch]) -> None:
        self.run, self.batches = run, batches

    def __iter__(self) -> Iterator[DenoiserInputs]:
        for batch in self.batches:
            yield from parts_of(self.run.prepare(send_to_device(batch, self.run.accelerator.device)))


def _call(model: nn.Module, inputs: DenoiserInputs, device: torch.device) -> torch.Tensor:
    return predict(model, _on(inputs, device))


def _on(inputs: DenoiserInputs, device: torch.device) -> DenoiserInputs:
    moved = {name: send_to_device(getattr(inputs, name), device) for name in ("arguments", "target", "weight")}
    return dataclasses.replace(inputs, **moved)

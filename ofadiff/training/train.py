"""Joint training of all subnets: one subnet per step, taught by the data and by the original model."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ofadiff.data.captioned_stream import TextToImageStream, load_stream
from ofadiff.data.order import Samples, fixed_batches, load_batches, step_batches
from ofadiff.data.stream import START
from ofadiff.denoisers.prepare import Prepare
from ofadiff.noise.draws import Batch
from ofadiff.reweight import sample_size
from ofadiff.supernet import Supernet
from ofadiff.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint, whole_supernet
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.sharding import check_sharding, forget_gathered, is_sharded, shard, without_weights
from ofadiff.training.single_size import SingleSize, trained_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a run reports.

    Attributes:
        steps: Optimizer steps made.
        seconds: Time they took, validation included, over all resumed parts of the run.
        history: Validation losses of the averaged weights, {step: {size: loss}}, from step 0 (before training) on.
        teacher_loss: The teacher's loss on the same noisy images, or None without a teacher or validation data.
    """

    steps: int
    seconds: float
    history: dict[int, dict[float, float]]
    teacher_loss: float | None


def train(
    supernet: Supernet | SingleSize,
    train_data: Samples | TextToImageStream,
    validation_data: Samples | None,
    prepare: Prepare,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    output_dir: str | Path,
    *,
    max_train_steps: int,
    train_batch_size: int,
    seed: int = 0,
    strategy: str = "linear",
    strategy_options: Mapping[str, float] | None = None,
    flags: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 1.0,
    feature_distill_weight: float = 0.0,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9999,
    offload_ema: bool = False,
    validation_steps: int | None = None,
    validation_samples: int = 512,
    on_validation: Callable[[int], None] | None = None,
    checkpointing_steps: int | None = None,
    checkpoints_total_limit: int | None = None,
    resume_from: str | Path | None = None,
    num_workers: int = 0,
) -> TrainingResult:
    """Trains a supernet in place; at the end its weights are their exponential moving average.

    Every step draws one size (equation 6) and trains that subnet alone, on the denoising loss plus the distance to the
    teacher. Sizes, samples and noise depend on the seed and the step only, so processes agree, and a run that is killed
    and resumed ends with the same weights. Dropout follows: the global random state is reseeded before every forward.

    Args:
        supernet: What is trained; or one size of it, extracted.
        train_data: Samples by key, such as `ImageData`, or a stream of them.
        validation_data: Held-out samples, or None for no validation.
        prepare: Makes the denoiser's inputs of a batch, such as `prepare_pixels` with its scheduler bound.
        optimizer: Over the parameters of `supernet.model` that want gradients.
        lr_scheduler: Of that optimizer; advanced once per optimizer step.
        accelerator: Devices, precision, gradient accumulation and trackers.
        output_dir: Where checkpoints go.
        max_train_steps: Optimizer steps of the whole run.
        train_batch_size: Samples per process and micro-step.
        seed: Of sizes, samples and noise.
        strategy: How sizes are drawn, a name of `ofadiff.reweight.STRATEGIES`.
        strategy_options: What the strategy takes, such as `m` of `"linear"`.
        flags: JSON values that checkpoints keep: what whoever calls this was asked for.
        teacher: The original denoiser, or None for no distillation.
        distill_weight: Of the distance to the teacher's prediction.
        feature_distill_weight: Of the relative distance to the outputs of the teacher's blocks.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: The average's largest decay; early steps use a smaller one, so that short runs average well too.
        offload_ema: Whether the average stays in main memory, which costs a copy of the weights per step.
        validation_steps: Steps between validations; there is always one before the first and one after the last step.
        validation_samples: Noisy images of each validation, the same ones every time.
        on_validation: Called on every process with the step, while `supernet` has its averaged weights. All of them
            have to call the model equally often.
        checkpointing_steps: Steps between checkpoints, or None for none.
        checkpoints_total_limit: Older checkpoints are removed.
        resume_from: A checkpoint of this run.
        num_workers: Processes that load images, per training process.

    Raises:
        ValueError: If the strategy is unknown, or the checkpoint is another run's.
        RuntimeError: If the loss is not finite, or too many samples of a stream cannot be read.
    """
    drawing: dict[str, Any] = {"seed": seed, "strategy": strategy, **(strategy_options or {})}
    draw_size: Callable[[int], float] = functools.partial(sample_size, supernet.sizes, **drawing)
    draw_size(0)  # an unknown strategy is an error now, not after the validation
    check_sharding(accelerator, validation_samples)
    skeleton = None
    if is_sharded(accelerator):
        if isinstance(supernet, SingleSize):
            raise ValueError("a single size is trained whole: choose multi-GPU, not FSDP, in `accelerate config`")
        skeleton = without_weights(supernet)
    if any(subnet.dropped for subnet in supernet.subnets):
        # A dropped branch gives its weights no gradient, for which DDP would wait.
        options = accelerator.ddp_handler or DistributedDataParallelKwargs()
        accelerator.ddp_handler = replace(options, find_unused_parameters=True)
    model, optimizer = accelerator.prepare(supernet.model, optimizer)
    device, micro_steps = accelerator.device, accelerator.gradient_accumulation_steps
    share = accelerator.process_index, accelerator.num_processes
    compared = teacher is not None and feature_distill_weight
    watched = tuple(dict.fromkeys(group.stage for group in supernet.groups)) if compared else ()
    if teacher is not None:
        teacher.to(device).eval()

    trained = list(trained_weights(supernet.model).values())
    ema = EMAModel(map(shard, trained), decay=ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    if offload_ema:
        ema.to("cpu")
    state = TrainingState(
        supernet,
        ema,
        optimizer,
        lr_scheduler,
        accelerator.scaler,
        run_values(accelerator, train_data, train_batch_size, seed, strategy, strategy_options),
        flags=dict(flags or {}),
        skeleton=skeleton,
    )
    if resume_from is not None:
        load_checkpoint(state, resume_from)

    validation_batches: Iterable[Batch] = ()
    teacher_loss = None
    if validation_data is not None:
        # Images are decoded anew at every validation: kept, they would fill the memory of a large model's run.
        validation_batches = fixed_batches(
            validation_data, validation_samples, train_batch_size, seed, "validation", *share
        )
        if teacher is not None:
            with accelerator.autocast():
                teacher_loss = validation_loss(teacher, validation_batches, prepare, accelerator)
            check_finite(teacher_loss, "the teacher's validation loss")

    def validate(step: int) -> None:
        supernet.model.eval()
        with averaged_weights(ema, trained, supernet.model):
            if validation_data is not None:
                losses = validation_losses(supernet, validation_batches, prepare, accelerator)
                for size, loss in losses.items():
                    check_finite(loss, f"the validation loss of size {size:g} at step {step}")
                state.history[step] = losses
                accelerator.log({f"validation_loss/{size:g}": loss for size, loss in losses.items()}, step)
            if on_validation is not None:
                on_validation(step)
        supernet.model.train()
        accelerator.wait_for_everyone()

    started = time.perf_counter() - state.seconds
    if state.step == 0:
        validate(0)
    steps = range(state.step, max_train_steps)
    batches: Iterator[Batch]
    if isinstance(train_data, TextToImageStream):
        keys = train_data.batches(state.place or START, steps, micro_steps, train_batch_size, *share)
        batches = iter(load_stream(train_data, keys, num_workers))
    else:
        indices = step_batches(len(train_data), steps, micro_steps, train_batch_size, seed, *share)
        batches = iter(load_batches(train_data, indices, num_workers))
    progress = tqdm(
        steps, "Training", initial=state.step, total=max_train_steps, disable=not accelerator.is_local_main_process
    )
    supernet.model.train()
    for step in progress:
        step_started = time.perf_counter()
        size = draw_size(step)
        # Set once: gradient checkpointing runs the forward again in the backward, which must meet the same size.
        supernet.set_size(size)
        step_loss = torch.zeros((), device=device)
        unreadable = torch.zeros((), device=device)
        for _ in range(micro_steps):
            batch = next(batches)
            unreadable += batch["unreadable"].sum() if "unreadable" in batch else 0
            torch.manual_seed(int(batch["seeds"][0]))
            inputs = prepare(send_to_device(batch, device))
            with accelerator.accumulate(model):
                with block_outputs(supernet.model, watched) as features:
                    prediction = predict(model, inputs)
                loss = prediction_loss(prediction, inputs)
                if teacher is not None:
                    weights = distill_weight, feature_distill_weight
                    with accelerator.autocast():
                        loss = loss + distillation_loss(teacher, inputs, prediction, features, *weights)
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                step_loss += loss.detach().mean() / micro_steps
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        ema.step([shard(weight).cpu() if offload_ema else shard(weight) for weight in trained])
        state.step = step + 1
        if "place" in batch:
            state.place = tuple(batch["place"][0].tolist())

        mean_loss, mean_unreadable = accelerator.reduce(torch.stack([step_loss, unreadable]), "mean").tolist()
        state.unreadable += round(mean_unreadable * accelerator.num_processes)
        if isinstance(train_data, TextToImageStream):
            train_data.check_unreadable(state.unreadable, state.step * state.run["samples per step"])
        if not math.isfinite(mean_loss):
            raise RuntimeError(f"the loss is {mean_loss} at step {step}, size {size}; try a lower learning rate")
        progress.set_postfix(loss=f"{mean_loss:.4f}", size=size)
        values = {"loss": mean_loss, f"loss/{size:g}": mean_loss, "size": size, "lr": lr_scheduler.get_last_lr()[0]}
        values["samples_per_second"] = state.run["samples per step"] / (time.perf_counter() - step_started)
        if state.unreadable:
            values["unreadable_samples"] = state.unreadable
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        accelerator.log(values, step)
        if (validation_steps and state.step % validation_steps == 0) or state.step == max_train_steps:
            validate(state.step)
        state.seconds = time.perf_counter() - started
        if checkpointing_steps and state.step % checkpointing_steps == 0:
            save_checkpoint(state, output_dir, checkpoints_total_limit, write=accelerator.is_main_process)
            accelerator.wait_for_everyone()

    if state.unreadable and accelerator.is_main_process:
        seen = state.step * state.run["samples per step"]
        logger.warning("%d of %d samples could not be read; others took their place", state.unreadable, seen)
    # Undo what `prepare` did for mixed precision: it wraps the model's forward, and unwrapping leaves an attribute.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(supernet.model).pop("forward", None)
    ema.copy_to(map(shard, trained))
    # What FSDP has split stays split: the supernet goes on with a whole model.
    vars(supernet).update(vars(whole_supernet(state)))
    supernet.set_size("largest")
    supernet.model.eval()
    return TrainingResult(state.step, state.seconds, state.history, teacher_loss)


def run_values(
    accelerator: Accelerator,
    train_data: Samples | TextToImageStream,
    train_batch_size: int,
    seed: int,
    strategy: str,
    strategy_options: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What decides the sizes, samples and noise of every step: a resumed run must have the same."""
    return {
        "seed": seed,
        "strategy": strategy,
        **(strategy_options or {}),
        "samples per step": accelerator.gradient_accumulation_steps * accelerator.num_processes * train_batch_size,
        "training images": str(train_data.stream) if isinstance(train_data, TextToImageStream) else len(train_data),
    }


def check_finite(loss: float, what: str) -> None:
    """Raises RuntimeError for a loss that is no number."""
    if not math.isfinite(loss):
        raise RuntimeError(f"{what} is {loss}; the weights or the inputs are out of range, or so is the precision")


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
        inputs = prepare(send_to_device(batch, accelerator.device))
        for size, at_size in at_sizes.items():
            with at_size():
                losses = prediction_loss(predict(model, inputs), inputs)
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

"""Joint training of all subnets: one subnet per step, taught by the data and by the original model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ofadiff.data.captioned_stream import TextToImageStream, load_stream
from ofadiff.data.order import Samples, fixed_batches, load_batches, step_batches
from ofadiff.data.stream import START
from ofadiff.denoisers.prepare import DenoiserInputs, parts_of
from ofadiff.denoisers.table import kind_of_model
from ofadiff.noise.draws import Batch
from ofadiff.reweight import sample_size
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import Objective, Schedule, TrainingResult, Watching
from ofadiff.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.sharding import check_sharding, forget_gathered, is_sharded, shard, split_alone, split_like
from ofadiff.training.single_size import SingleSize, trained_weights
from ofadiff.training.validation import averaged_weights, check_finite, validation_loss, validation_losses

logger = logging.getLogger(__name__)

TrainData = Samples | TextToImageStream


def train(
    supernet: Supernet | SingleSize,
    train_data: TrainData,
    validation_data: Samples | None,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    output_dir: str | Path,
    schedule: Schedule,
    watching: Watching | None = None,
    resume_from: str | Path | None = None,
) -> TrainingResult:
    """Trains a supernet in place; at the end its weights are their exponential moving average.

    Every step draws one size (equation 6) and trains that subnet alone, on the denoising loss plus the distance to the
    teacher. Sizes, samples and noise depend on the seed and the step only, so processes agree, and a run that is killed
    and resumed ends with the same weights. Dropout follows: the global random state is reseeded before every forward.

    Under FSDP weights stay split over the processes, the teacher's too: at the end all of them call
    `supernet.save_pretrained(folder, is_main_process=accelerator.is_main_process)`, and what that wrote can be loaded.

    Args:
        supernet: What is trained; or one size of it, extracted.
        train_data: Samples by key, such as `ImageData`, or a stream of them.
        validation_data: Held-out samples, or None for no validation.
        objective: What is learnt, and who teaches.
        optimizer: Over the parameters of `supernet.model` that want gradients.
        lr_scheduler: Of that optimizer's learning rate; advanced once per optimizer step.
        accelerator: Devices, precision, gradient accumulation and trackers.
        output_dir: Where checkpoints go.
        schedule: How long, and in which steps.
        watching: Validations and checkpoints.
        resume_from: A checkpoint of this run.

    Raises:
        ValueError: If the strategy is unknown, or the checkpoint is another run's.
        RuntimeError: If the loss is not finite, or too many samples of a stream cannot be read.

    Example:
        >>> objective = Objective(prepare, teacher)
        >>> schedule = Schedule(max_train_steps=10_000, train_batch_size=64)
        >>> train(supernet, data, None, objective, optimizer, lr_scheduler, Accelerator(), "out", schedule)
    """
    watching = Watching() if watching is None else watching
    run = _Run(supernet, train_data, objective, optimizer, lr_scheduler, accelerator, schedule, watching, resume_from)
    run.begin_validation(validation_data)
    state = run.state
    started = time.perf_counter() - state.seconds
    if state.step == 0:
        run.validate(0)
    steps = range(state.step, schedule.max_train_steps)
    batches = run.batches(steps)
    show = accelerator.is_local_main_process
    progress = tqdm(steps, "Training", initial=state.step, total=schedule.max_train_steps, disable=not show)
    supernet.model.train()
    for step in progress:
        values = run.step(step, batches)
        progress.set_postfix(loss=f"{values['loss']:.4f}", size=values["size"])
        accelerator.log(values, step)
        due = watching.validation_steps and state.step % watching.validation_steps == 0
        if due or state.step == schedule.max_train_steps:
            run.validate(state.step)
        state.seconds = time.perf_counter() - started
        if watching.checkpointing_steps and state.step % watching.checkpointing_steps == 0:
            limit = watching.checkpoints_total_limit
            save_checkpoint(state, output_dir, limit, write=accelerator.is_main_process)
            accelerator.wait_for_everyone()
    return run.finish()


class _Run:
    """A training run on its devices: its steps, its validations and its end."""

    def __init__(
        self,
        supernet: Supernet | SingleSize,
        train_data: TrainData,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
        schedule: Schedule,
        watching: Watching,
        resume_from: str | Path | None,
    ) -> None:
        self.supernet, self.train_data, self.objective = supernet, train_data, objective
        self.accelerator, self.schedule, self.watching = accelerator, schedule, watching
        self.draw_size(0)  # an unknown strategy is an error now, not after the validation
        check_sharding(accelerator, watching.validation_samples)
        if is_sharded(accelerator) and isinstance(supernet, SingleSize):
            raise ValueError("a single size is trained whole: choose multi-GPU, not FSDP, in `accelerate config`")
        kind = kind_of_model(supernet.model)
        if is_sharded(accelerator) and kind is not None:
            split_alone(accelerator, supernet.model, kind.split_alone)
        if any(subnet.dropped for subnet in supernet.subnets):
            # A dropped branch gives its weights no gradient, for which DDP would wait.
            options = accelerator.ddp_handler or DistributedDataParallelKwargs()
            accelerator.ddp_handler = replace(options, find_unused_parameters=True)
        self.model, self.optimizer = accelerator.prepare(supernet.model, optimizer)
        self.lr_scheduler = lr_scheduler
        self.share = accelerator.process_index, accelerator.num_processes
        compared = objective.teacher is not None and objective.feature_distill_weight
        self.watched = tuple(dict.fromkeys(group.stage for group in supernet.groups)) if compared else ()
        if objective.teacher is not None:
            if is_sharded(accelerator):
                split_like(objective.teacher, supernet.model)
            objective.teacher.to(accelerator.device).eval()
        self.trained = list(trained_weights(supernet.model).values())
        ema = EMAModel(
            map(shard, self.trained), decay=schedule.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True
        )
        if schedule.offload_ema:
            ema.to("cpu")
        self.state = TrainingState(
            supernet,
            ema,
            self.optimizer,
            lr_scheduler,
            accelerator.scaler,
            run_values(accelerator, train_data, schedule),
            flags=dict(watching.flags),
        )
        if resume_from is not None:
            load_checkpoint(self.state, resume_from)
        self.validation_data: Samples | None = None
        self.validation_batches: Iterable[Batch] = ()
        self.teacher_loss: float | None = None

    def draw_size(self, step: int) -> float:
        """The size that a step trains."""
        options, schedule = self.schedule.strategy_options, self.schedule
        return sample_size(self.supernet.sizes, step, schedule.seed, schedule.strategy, **options)

    def begin_validation(self, validation_data: Samples | None) -> None:
        """Chooses the noisy images of every validation, and sees what the teacher makes of them."""
        self.validation_data = validation_data
        if validation_data is None:
            return
        # Images are decoded anew at every validation: kept, they would fill the memory of a large model's run.
        samples, batch_size = self.watching.validation_samples, self.schedule.train_batch_size
        self.validation_batches = fixed_batches(
            validation_data, samples, batch_size, self.schedule.seed, "validation", *self.share
        )
        if self.objective.teacher is not None:
            batches, prepare = self.validation_batches, self.objective.prepare
            with self.accelerator.autocast():
                self.teacher_loss = validation_loss(self.objective.teacher, batches, prepare, self.accelerator)
            check_finite(self.teacher_loss, "the teacher's validation loss")

    def validate(self, step: int) -> None:
        """The losses of every size, of the averaged weights, and whatever else is done at a validation."""
        supernet = self.supernet
        supernet.model.eval()
        with averaged_weights(self.state.ema, self.trained, supernet.model):
            if self.validation_data is not None:
                prepare = self.objective.prepare
                losses = validation_losses(supernet, self.validation_batches, prepare, self.accelerator)
                for size, loss in losses.items():
                    check_finite(loss, f"the validation loss of size {size:g} at step {step}")
                self.state.history[step] = losses
                self.accelerator.log({f"validation_loss/{size:g}": loss for size, loss in losses.items()}, step)
            if self.watching.on_validation is not None:
                self.watching.on_validation(step)
        supernet.model.train()
        self.accelerator.wait_for_everyone()

    def batches(self, steps: range) -> Iterator[Batch]:
        """This process' batches of some steps."""
        data, schedule = self.train_data, self.schedule
        micro_steps, batch_size = self.accelerator.gradient_accumulation_steps, schedule.train_batch_size
        if isinstance(data, TextToImageStream):
            keys = data.batches(self.state.place or START, steps, micro_steps, batch_size, *self.share)
            return iter(load_stream(data, keys, schedule.num_workers))
        indices = step_batches(len(data), steps, micro_steps, batch_size, schedule.seed, *self.share)
        return iter(load_batches(data, indices, schedule.num_workers))

    def step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step at one size; returns what trackers get of it."""
        started = time.perf_counter()
        accelerator, state, device = self.accelerator, self.state, self.accelerator.device
        size = self.draw_size(step)
        # Set once: gradient checkpointing runs the forward again in the backward, which must meet the same size.
        self.supernet.set_size(size)
        step_loss = torch.zeros((), device=device)
        unreadable = torch.zeros((), device=device)
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = next(batches)
            unreadable += batch["unreadable"].sum() if "unreadable" in batch else 0
            step_loss += self._micro_step(batch) / accelerator.gradient_accumulation_steps
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        offload = self.schedule.offload_ema
        state.ema.step([shard(weight).cpu() if offload else shard(weight) for weight in self.trained])
        state.step = step + 1
        if "place" in batch:
            state.place = tuple(batch["place"][0].tolist())

        loss, mean_unreadable = accelerator.reduce(torch.stack([step_loss, unreadable]), "mean").tolist()
        state.unreadable += round(mean_unreadable * accelerator.num_processes)
        if isinstance(self.train_data, TextToImageStream):
            self.train_data.check_unreadable(state.unreadable, state.step * state.run["samples per step"])
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {step}, size {size}; try a lower learning rate")
        values = {"loss": loss, f"loss/{size:g}": loss, "size": size, "lr": self.lr_scheduler.get_last_lr()[0]}
        values["samples_per_second"] = state.run["samples per step"] / (time.perf_counter() - started)
        if state.unreadable:
            values["unreadable_samples"] = state.unreadable
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values

    def _micro_step(self, batch: Batch) -> Tensor:
        """Forward and backward of one batch, and the step of the optimizer if it is the last one; the mean loss."""
        accelerator, objective = self.accelerator, self.objective
        torch.manual_seed(int(batch["seeds"][0]))
        parts = parts_of(objective.prepare(send_to_device(batch, accelerator.device)))
        with accelerator.accumulate(self.model):
            loss = torch.cat([self._losses(inputs) for inputs in parts])
            accelerator.backward(loss.mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.trained, self.schedule.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach().mean()

    def _losses(self, inputs: DenoiserInputs) -> Tensor:
        """Each sample's loss in one forward, `(N,)`."""
        teacher, weights = (
            self.objective.teacher,
            (self.objective.distill_weight, self.objective.feature_distill_weight),
        )
        with block_outputs(self.supernet.model, self.watched) as features:
            prediction = predict(self.model, inputs)
        loss = prediction_loss(prediction, inputs)
        if teacher is not None:
            with self.accelerator.autocast():
                loss = loss + distillation_loss(teacher, inputs, prediction, features, *weights)
        return loss

    def finish(self) -> TrainingResult:
        """Leaves a model with averaged weights, in eval mode, at its largest size; what FSDP has split stays split."""
        accelerator, state, supernet = self.accelerator, self.state, self.supernet
        if state.unreadable and accelerator.is_main_process:
            seen = state.step * state.run["samples per step"]
            logger.warning("%d of %d samples could not be read; others took their place", state.unreadable, seen)
        # Undo what `prepare` did for mixed precision: it wraps the model's forward, and unwrapping leaves an attribute.
        accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(supernet.model).pop("forward", None)
        state.ema.copy_to(map(shard, self.trained))
        forget_gathered(supernet.model)
        supernet.set_size("largest")
        supernet.model.eval()
        return TrainingResult(state.step, state.seconds, state.history, self.teacher_loss)


def run_values(accelerator: Accelerator, train_data: TrainData, schedule: Schedule) -> dict[str, Any]:
    """What decides the sizes, samples and noise of every step: a resumed run must have the same."""
    processes, micro_steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    return {
        "seed": schedule.seed,
        "strategy": schedule.strategy,
        **schedule.strategy_options,
        "samples per step": micro_steps * processes * schedule.train_batch_size,
        "training images": str(train_data.stream) if isinstance(train_data, TextToImageStream) else len(train_data),
    }

"""Joint training of all subnets: one subnet per step, taught by the data and by the original model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ofadiff.data.captioned_stream import TextToImageStream, load_stream
from ofadiff.data.images import NAMED
from ofadiff.data.order import Samples, fixed_batches, load_batches, share_of_step, step_batches
from ofadiff.data.stream import START
from ofadiff.denoisers.prepare import DenoiserInputs, parts_of
from ofadiff.denoisers.table import kind_of_model
from ofadiff.noise.draws import Batch, stratified_quantiles
from ofadiff.reweight import sample_size
from ofadiff.storage.finite import NotFiniteError
from ofadiff.storage.split import gather
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import Objective, Schedule, TrainingResult, Watching
from ofadiff.training.checkpoint import TrainingState, list_checkpoints, load_checkpoint, save_checkpoint
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.interrupts import STOPPING, InterruptedRun, Interrupts, name_of
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.sharding import check_sharding, forget_gathered, is_sharded, shard, split_alone, split_like
from ofadiff.training.single_size import SingleSize, trained_weights
from ofadiff.training.validation import (
    averaged_weights,
    check_finite,
    validation_loss,
    validation_losses,
)

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
    A step whose loss or gradient is not finite changes nothing, on any process. Ctrl-C, SIGTERM and SIGUSR1 end the run
    after the step that is being made, with a checkpoint; a second one ends it at once.
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
        NotFiniteError: If `max_skipped_steps` losses in a row are not finite, or a validation's loss is not.
        RuntimeError: If too many samples of a stream cannot be read.
        OSError: If a checkpoint cannot be written.
        InterruptedRun: After a signal. It is a KeyboardInterrupt.

    Example:
        >>> objective = Objective(prepare, teacher)
        >>> schedule = Schedule(max_train_steps=10_000, train_batch_size=64)
        >>> train(supernet, data, None, objective, optimizer, lr_scheduler, Accelerator(), "out", schedule)
    """
    watching = Watching() if watching is None else watching
    built = optimizer, lr_scheduler, accelerator, output_dir
    with Interrupts() as interrupts:
        run = _Run(supernet, train_data, objective, *built, schedule, watching, resume_from, interrupts)
        run.begin_validation(validation_data)
        state = run.state
        started = time.perf_counter() - state.seconds
        if state.step == 0 or state.validation_missing:
            run.validate(state.step)
        steps = range(state.step, schedule.max_train_steps)
        batches = run.batches(steps)
        show = accelerator.is_local_main_process
        progress = tqdm(steps, "Training", initial=state.step, total=schedule.max_train_steps, disable=not show)
        supernet.model.train()
        for step in progress:
            values = run.step(step, batches)
            progress.set_postfix(loss=f"{values['loss']:.4f}", size=values["size"])
            accelerator.log(values, state.step)
            state.seconds = time.perf_counter() - started
            due = watching.validation_steps and state.step % watching.validation_steps == 0
            state.validation_missing = bool(due) or state.step == schedule.max_train_steps
            if run.stopped_by is not None:
                run.stop()
            if state.validation_missing:
                run.validate(state.step)
            state.seconds = time.perf_counter() - started
            if watching.checkpointing_steps and state.step % watching.checkpointing_steps == 0:
                run.checkpoint()
        run.agree_to_stop()
        if run.stopped_by is not None:
            run.stop()
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
        output_dir: str | Path,
        schedule: Schedule,
        watching: Watching,
        resume_from: str | Path | None,
        interrupts: Interrupts,
    ) -> None:
        self.supernet, self.train_data, self.objective = supernet, train_data, objective
        self.accelerator, self.schedule, self.watching = accelerator, schedule, watching
        self.output_dir, self.interrupts = Path(output_dir), interrupts
        self.stopped_by: int | None = None
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
        self.saved_step = self.state.step
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
        self.state.validation_missing = False
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
        for micro_step in range(accelerator.gradient_accumulation_steps):
            batch = self._stratified(next(batches), step, micro_step)
            unreadable += batch["unreadable"].sum() if "unreadable" in batch else 0
            step_loss += self._micro_step(batch) / accelerator.gradient_accumulation_steps
        norm = gather(accelerator.clip_grad_norm_(self.trained, self.schedule.max_grad_norm)).to(step_loss)
        # One exchange for all that processes have to agree on before the weights change.
        noted = [torch.tensor(float(self.interrupts.received == each), device=device) for each in STOPPING]
        found = accelerator.reduce(torch.stack([step_loss, unreadable, norm, *noted]), "mean").tolist()
        loss, mean_unreadable, norm = found[:3]
        self._hear(found[3:])
        self._update(step, size, loss, norm)
        state.step = step + 1
        if "place" in batch:
            state.place = tuple(batch["place"][0].tolist())

        state.unreadable += round(mean_unreadable * accelerator.num_processes)
        if isinstance(self.train_data, TextToImageStream):
            self.train_data.check_unreadable(state.unreadable, state.step * state.run["samples per step"])
        values = {"loss": loss, f"loss/{size:g}": loss, "size": size, "lr": self.lr_scheduler.get_last_lr()[0]}
        values["samples_per_second"] = state.run["samples per step"] / (time.perf_counter() - started)
        if state.unreadable:
            values["unreadable_samples"] = state.unreadable
        if state.skipped:
            values["skipped_steps"] = state.skipped
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values

    def _stratified(self, batch: Batch, step: int, micro_step: int) -> Batch:
        """With this batch's part of the quantiles of the step's noise levels, if they are stratified."""
        if not self.schedule.stratify_timesteps:
            return batch
        quantiles = stratified_quantiles(self.state.run["samples per step"], step, self.schedule.seed)
        return {**batch, "quantiles": quantiles[share_of_step(micro_step, self.schedule.train_batch_size, *self.share)]}

    def _micro_step(self, batch: Batch) -> Tensor:
        """Forward and backward of one batch; the mean loss."""
        accelerator, objective = self.accelerator, self.objective
        torch.manual_seed(int(batch["seeds"][0]))
        parts = parts_of(objective.prepare(send_to_device(batch, accelerator.device)))
        with accelerator.accumulate(self.model):
            loss = torch.cat([self._losses(inputs) for inputs in parts])
            accelerator.backward(loss.mean())
            return loss.detach().mean()

    def _update(self, step: int, size: float, loss: float, norm: float) -> None:
        """The step of the optimizer and of the average; nothing where the loss or the gradient is not finite.

        Raises:
            NotFiniteError: If so many steps in a row were skipped as the schedule allows.
        """
        state, scaled = self.state, self.accelerator.scaler is not None
        # In float16 a gradient may be too large for the scaler, which then skips the step itself and scales less.
        finite = math.isfinite(loss) and (scaled or math.isfinite(norm))
        if finite or scaled:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped if scaled else finite:
            self.lr_scheduler.step()
            offload = self.schedule.offload_ema
            state.ema.step([shard(weight).cpu() if offload else shard(weight) for weight in self.trained])
        state.skipped += not finite
        state.skipped_in_row = 0 if finite else state.skipped_in_row + 1
        if finite:
            return
        what = f"the loss is {loss} and the norm of its gradient {norm} at step {step}, size {size:g}"
        if state.skipped_in_row >= self.schedule.max_skipped_steps:
            whole = [path.name for path in list_checkpoints(self.output_dir)][-1:]
            raise NotFiniteError(
                f"{what}, the last of {state.skipped_in_row} such steps in a row (--max_skipped_steps), which were "
                "skipped: begin again with a lower --learning_rate, or with --mixed_precision bf16 or no in place of "
                f"fp16, or look for broken samples; the last checkpoint is {whole[0] if whole else 'none'}"
            )
        if self.accelerator.is_main_process and state.skipped <= NAMED:
            last = "; others that follow are counted and no longer named" if state.skipped == NAMED else ""
            logger.warning("%s: the step is skipped%s", what, last)

    def checkpoint(self) -> None:
        """Writes a checkpoint. Raises OSError on every process if that cannot be done."""
        accelerator, error = self.accelerator, None
        limit = self.watching.checkpoints_total_limit
        try:
            save_checkpoint(self.state, self.output_dir, limit, write=accelerator.is_main_process)
        except OSError as caught:
            if is_sharded(accelerator):
                raise  # the others wait for tensors; whoever started the processes ends them with this one
            error = caught
        failed = torch.tensor(float(error is not None), device=accelerator.device)
        failed = accelerator.reduce(failed, "sum")  # for which all wait
        if error is not None:
            raise error
        if failed:
            raise OSError("the first process could not write a checkpoint")
        self.saved_step = self.state.step

    def agree_to_stop(self) -> None:
        """Hears of signals that came to any process after the last step."""
        noted = [float(self.interrupts.received == each) for each in STOPPING]
        self._hear(self.accelerator.reduce(torch.tensor(noted, device=self.accelerator.device), "mean").tolist())

    def _hear(self, shares: list[float]) -> None:
        """Takes note of the share of processes to which each signal came."""
        for number, share in zip(STOPPING, shares, strict=True):
            if share:
                self.stopped_by = number

    def stop(self) -> NoReturn:
        """Ends the run with a checkpoint, unless there is one of this step."""
        assert self.stopped_by is not None
        step, by = self.state.step, f"stopped by {name_of(self.stopped_by)}"
        if step == 0:
            raise InterruptedRun(f"{by} before the first step", self.stopped_by)
        if self.saved_step != step:
            self.checkpoint()
        how = "the same command goes on from there with --resume_from_checkpoint latest"
        raise InterruptedRun(f"{by} after step {step}, with a checkpoint: {how}", self.stopped_by)

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
        if state.skipped and accelerator.is_main_process:
            logger.warning("%d of %d steps were skipped: their loss was not finite", state.skipped, state.step)
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
        "stratify_timesteps": schedule.stratify_timesteps,
        "samples per step": micro_steps * processes * schedule.train_batch_size,
        "training images": str(train_data.stream) if isinstance(train_data, TextToImageStream) else len(train_data),
    }

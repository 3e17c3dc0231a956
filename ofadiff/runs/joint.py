"""The joint training of a run, and the images that it draws on the way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image

from ofadiff.evaluation.finite import finite_outputs
from ofadiff.runs.drawing import DRAW
from ofadiff.runs.run import Run
from ofadiff.runs.settings import Optimization
from ofadiff.runs.sizes import schedule_of
from ofadiff.storage.sealed import remove
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import Objective, TrainingResult, Watching
from ofadiff.training.checkpoint import list_checkpoints, read_step
from ofadiff.training.muon import Muon, split_weights
from ofadiff.training.single_size import SingleSize, trained_weights
from ofadiff.training.train import train


def train_jointly(run: Run, supernet: Supernet | SingleSize) -> TrainingResult:
    """Trains one subnet per step, in place; the pipeline gets what is trained as its denoiser.

    Args:
        run: What it was built for.
        supernet: What is trained; or one size of it.

    Raises:
        ValueError: If the checkpoint to resume from is another run's.
        RuntimeError: If a validation's loss is not finite, or those of `--max_skipped_steps` steps in a row; or if too
            many samples of a stream cannot be read.
        InterruptedRun: After Ctrl-C, SIGTERM or SIGUSR1, with a checkpoint.
    """
    accelerator, settings = run.accelerator, run.settings
    optimization, watching, losses = settings.optimization, settings.watching, settings.losses
    if run.pipeline is not None:
        run.pipeline.register_modules(**{run.original.component: supernet.model})
    if optimization.gradient_checkpointing:
        supernet.model.enable_gradient_checkpointing()
    optimizer = make_optimizer(optimization, supernet)
    assert optimization.lr_scheduler is not None
    lr_scheduler = get_scheduler(
        optimization.lr_scheduler,
        optimizer,
        num_warmup_steps=optimization.lr_warmup_steps,
        num_training_steps=optimization.max_train_steps,
    )
    folder = settings.output.output_dir
    if accelerator.is_main_process and settings.output.overwrite_output_dir:
        for old in list_checkpoints(folder):
            remove(old)
    flags = settings.flags()
    begin_trackers(run, flags)
    columns = DRAW[run.original.kind.condition].columns(watching)
    assert losses.distill_weight is not None
    taught = losses.distill_weight or losses.feature_distill_weight
    objective = Objective(
        run.prepare, run.teacher if taught else None, losses.distill_weight, losses.feature_distill_weight
    )
    watched = Watching(
        validation_steps=watching.validation_steps,
        validation_samples=watching.validation_samples,
        on_validation=functools.partial(draw_samples, run, supernet, columns) if columns else None,
        checkpointing_steps=watching.checkpointing_steps,
        checkpoints_total_limit=watching.checkpoints_total_limit,
        flags=flags,
    )
    data = run.data.training, run.data.validation
    built = optimizer, lr_scheduler, accelerator
    return train(supernet, *data, objective, *built, folder, schedule_of(run), watched, run.checkpoint)


def begin_trackers(run: Run, flags: dict[str, Any]) -> None:
    """Starts the trackers where the run starts: TensorBoard shows no step twice that was made again after a kill."""
    begun = 0 if run.checkpoint is None else read_step(run.checkpoint) + 1
    name, config = run.settings.watching.tracker_project_name, flat(flags) if run.checkpoint is None else None
    run.accelerator.init_trackers(name, config, init_kwargs={"tensorboard": {"purge_step": begun}})


def make_optimizer(optimization: Optimization, supernet: Supernet | SingleSize) -> torch.optim.Optimizer:
    """Muon, or AdamW, with its moments in 8 bits if asked for."""
    options: dict[str, Any] = {
        "lr": optimization.learning_rate,
        "betas": (optimization.adam_beta1, optimization.adam_beta2),
        "weight_decay": optimization.adam_weight_decay,
        "eps": optimization.adam_epsilon,
    }
    if optimization.optimizer == "muon":
        matrices, others = split_weights(supernet.model, supernet.groups)
        return Muon(matrices.values(), others.values(), momentum=optimization.muon_momentum, **options)
    optimizer_class = torch.optim.AdamW
    if optimization.use_8bit_adam:
        import bitsandbytes  # an extra that needs a GPU

        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(trained_weights(supernet.model).values(), **options)


@torch.no_grad()
def draw_samples(run: Run, supernet: Supernet | SingleSize, columns: int, step: int) -> None:
    """Writes `samples/{step}.png`: a row per size, a column per seed; trackers get it too. On every process."""
    accelerator, draw = run.accelerator, DRAW[run.original.kind.condition].images
    images: list[Image.Image] = []
    for size in supernet.sizes:
        seed = run.settings.optimization.seed
        generators = [torch.Generator().manual_seed(seed + column) for column in range(columns)]
        watched = finite_outputs(run.pipeline, supernet.model, f"size {size:g} after {step} training steps")
        with supernet.at(size), accelerator.autocast(), watched:
            images += draw(run, generators)
    if not accelerator.is_main_process:
        return
    grid = make_image_grid(images, rows=len(supernet.sizes), cols=columns)
    folder = Path(run.settings.output.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"{step:06}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [grid]}, step)


def flat(values: dict[str, object]) -> dict[str, object]:
    """Settings as trackers take them: numbers and strings."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}

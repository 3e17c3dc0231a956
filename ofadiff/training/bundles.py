"""What a training run is told, in a few named bundles, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ofadiff.denoisers.prepare import Prepare


@dataclass(frozen=True)
class Objective:
    """What is learnt.

    Attributes:
        prepare: Makes the denoiser's inputs of a batch, such as `prepare_batch` with its kind bound.
        teacher: The original denoiser, or None for no distillation; FSDP splits it as it splits the supernet, in place.
        distill_weight: Weight of the distance to the teacher's prediction.
        feature_distill_weight: Weight of the relative distance to the outputs of the teacher's blocks.
    """

    prepare: Prepare
    teacher: nn.Module | None = None
    distill_weight: float = 4.0
    feature_distill_weight: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How long and in which steps it is learnt.

    Attributes:
        max_train_steps: Optimizer steps of the whole run.
        train_batch_size: Samples per process and micro-step.
        seed: Seed of sizes, samples and noise.
        strategy: How the size of a step is chosen, a name of `ofadiff.reweight.STRATEGIES`; recipes take `"spread"`.
        strategy_options: What the strategy takes, such as `m` of `"linear"` and `"spread"`.
        stratify_timesteps: Whether a step's noise levels are spread over all of them, see `stratified_quantiles`, or
            drawn independently. Recipes spread them. Recorded calls have their own.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: The average's largest decay; early steps use a smaller one, so that short runs average well too.
        offload_ema: Whether the average stays in main memory, which costs a copy of the weights per step.
        num_workers: Processes that load images, per training process.
        max_skipped_steps: Steps whose loss or gradient is not finite are skipped; so many in a row stop the run.
    """

    max_train_steps: int
    train_batch_size: int
    seed: int = 0
    strategy: str = "linear"
    strategy_options: Mapping[str, float] = field(default_factory=dict)
    stratify_timesteps: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    offload_ema: bool = False
    num_workers: int = 0
    max_skipped_steps: int = 10


@dataclass(frozen=True)
class Watching:
    """What is looked at and kept on the way.

    Attributes:
        validation_steps: Steps between validations; there is always one before the first and one after the last step.
        validation_samples: Noisy images of each validation, the same ones every time.
        on_validation: Called on every process with the step, while the model has its averaged weights. All of them have
            to call the model equally often.
        checkpointing_steps: Steps between checkpoints, or None for none.
        checkpoints_total_limit: How many checkpoints are kept; None for all.
        flags: JSON values that checkpoints keep: what whoever calls this was asked for.
    """

    validation_steps: int | None = None
    validation_samples: int = 512
    on_validation: Callable[[int], None] | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)


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

"""Distillation from the frozen original: on its prediction and on the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.training.losses import DenoiserInputs, mean_squared_error, predict


@contextmanager
def block_outputs(model: nn.Module, stages: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what the named blocks of a model put out, in the order of their calls, while the context is open.

    Blocks are hooked from outside, so gradient checkpointing (which works inside a block) and wrappers such as DDP
    around the model do not matter. A block that returns a tuple is taken at its first entry, the hidden states.

    Args:
        model: The bare model, not its DDP wrapper.
        stages: Module names, such as `down_blocks.0` or `mid_block`.

    Yields:
        A dict `{stage: output}`, filled by each forward.
    """
    outputs: dict[str, Tensor] = {}

    def keep(stage: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[stage] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(stage).register_forward_hook(keep(stage)) for stage in stages]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Squared distance of block outputs over the teacher's squared length, averaged over blocks: `(N,)`.

    Normalised per block and sample, so no block counts more because its activations are large, and a sample's loss does
    not depend on the rest of its batch. The residual stream has full width in every subnet: no adapters are needed.
    """
    losses = []
    for stage, target in teacher.items():
        distance = mean_squared_error(student[stage], target)
        length = target.float().square().flatten(1).mean(dim=1)
        losses.append(distance / length.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(losses).mean(dim=0)


def distillation_loss(
    teacher: nn.Module,
    inputs: DenoiserInputs,
    prediction: Tensor,
    features: Mapping[str, Tensor],
    weight: float = 1.0,
    feature_weight: float = 0.0,
) -> Tensor:
    """How far a student is from its teacher on the same noisy input, for each sample: `(N,)`.

    Args:
        teacher: The frozen original; it is run without gradients.
        inputs: What the student was called with.
        prediction: The student's, `(N, C, H, W)`.
        features: The student's `block_outputs`; the teacher's are taken at the same blocks. If empty, only the
            predictions count.
        weight: Of the squared distance of the predictions, which has the scale of the denoising loss.
        feature_weight: Of `feature_loss`, whose terms are relative errors.
    """
    with torch.no_grad(), block_outputs(teacher, list(features)) as teacher_features:
        teacher_prediction = predict(teacher, inputs)
    loss = weight * inputs.weight * mean_squared_error(prediction, teacher_prediction)
    if features:
        loss = loss + feature_weight * feature_loss(features, teacher_features)
    return loss

"""Distillation from the frozen original: on its prediction and on the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.denoisers.prepare import DenoiserInputs
from ofadiff.training.losses import mean_squared_error, predict

# What blocks put out, by their names.
Features = dict[str, tuple[Tensor, ...]]


@contextmanager
def block_outputs(model: nn.Module, stages: Sequence[str]) -> Iterator[Features]:
    """Keep what the named blocks of a model put out, in the order of their calls, while the context is open.

    Blocks are hooked from outside, so gradient checkpointing and wrappers such as DDP around the model do not matter.

    Args:
        model: The bare model, not its DDP wrapper.
        stages: Module names, such as `down_blocks.0` or `mid_block`; a list of blocks, such as `transformer_blocks`,
            stands for each of them.

    Yields:
        A dict `{block: output}`, filled by each forward. Of a block that returns a tuple these are its tensors: the two
        streams of a joint attention, or the hidden states without the tuple of skip connections.
    """
    outputs: Features = {}

    def keep(block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            entries = output if isinstance(output, tuple) else (output,)
            outputs[block] = tuple(entry for entry in entries if isinstance(entry, Tensor))

        return hook

    handles = [module.register_forward_hook(keep(block)) for block, module in _blocks(model, stages)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module, stages: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for stage in stages:
        module = model.get_submodule(stage)
        if isinstance(module, nn.ModuleList):
            yield from ((f"{stage}.{name}", block) for name, block in module.named_children())
        else:
            yield stage, module


def feature_loss(student: Features, teacher: Features, rows: int) -> Tensor:
    """Squared distance of block outputs over the teacher's squared length, averaged over their tensors: `(N,)`.

    Normalised per tensor and sample, so none counts more because its activations are large, and a sample's loss does
    not depend on the rest of its batch. The residual stream has full width in every subnet: no adapters are needed.

    Args:
        student: What its blocks put out.
        teacher: What the same blocks of the teacher put out.
        rows: N; a block that works on something else than samples, such as frames or pixels of a video, counts with
            its mean, the same for all samples.
    """
    losses = []
    for block, targets in teacher.items():
        for output, target in zip(student[block], targets, strict=True):
            distance = mean_squared_error(output, target)
            length = target.float().square().flatten(1).mean(dim=1)
            loss = distance / length.clamp_min(torch.finfo(torch.float32).tiny)
            losses.append(loss if len(loss) == rows else loss.mean().expand(rows))
    return torch.stack(losses).mean(dim=0)


def distillation_loss(
    teacher: nn.Module,
    inputs: DenoiserInputs,
    prediction: Tensor,
    features: Features,
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
        weight: Weight of the squared distance of the predictions, which has the scale of the denoising loss.
        feature_weight: Weight of `feature_loss`, whose terms are relative errors.
    """
    with torch.no_grad(), block_outputs(teacher, list(features)) as teacher_features:
        teacher_prediction = predict(teacher, inputs)
    loss = weight * inputs.weight * mean_squared_error(prediction, teacher_prediction)
    if features:
        loss = loss + feature_weight * feature_loss(features, teacher_features, len(prediction))
    return loss

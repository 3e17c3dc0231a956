"""`ofadiff heal`: one size of a checkpoint, trained alone."""

from __future__ import annotations

from ofadiff.runs.healing import make_single_size, save_healed, start_healing
from ofadiff.runs.joint import train_jointly
from ofadiff.runs.settings import (
    Calls,
    Captions,
    Classes,
    Data,
    Losses,
    Model,
    OneSize,
    Optimization,
    Output,
    RunSettings,
    Watching,
)
from ofadiff.training.bundles import TrainingResult


def heal(
    *,
    model: Model,
    one_size: OneSize,
    data: Data = Data(),
    output: Output,
    captions: Captions = Captions(),
    classes: Classes = Classes(),
    calls: Calls = Calls(),
    losses: Losses = Losses(),
    optimization: Optimization = Optimization(),
    watching: Watching = Watching(),
) -> TrainingResult:
    """Heal one size of an OFA checkpoint with a LoRA, or fine-tune its extracted subnet.

    With `--lora_rank` a LoRA for the size is put beside weights that stay what they are: setting that size activates
    it, extracting that size merges it, no other size sees it. Without it `--output_dir` becomes a plain pipeline folder
    of the subnet, trained further. The checkpoint at full size teaches.

    Without any data it is trained on recordings of the pipeline's own calls, given with `--calls_file`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    settings = RunSettings(
        model=model,
        one_size=one_size,
        data=data,
        output=output,
        captions=captions,
        classes=classes,
        calls=calls,
        losses=losses,
        optimization=optimization,
        watching=watching,
    )
    run = start_healing(settings)
    single = make_single_size(run)
    result = train_jointly(run, single)
    save_healed(run, single, result, output.output_dir)
    return result

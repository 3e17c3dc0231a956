"""Compresses a pipeline of any class to several sizes at once, from calls alone: no images, no captions of images.

    accelerate launch recipes/compress_any.py --pretrained_model_name_or_path DIR --calls_file prompts.txt \
        --sizes 0.4 0.6 0.8 1.0 --mixed_precision bf16 --output_dir OUT

records what the pipeline calls its denoiser with and what that answers, trains every size on these answers, and makes a
pipeline folder that holds all sizes of the denoiser in one set of weights.
"""

from __future__ import annotations

from ofadiff import Supernet, find_channel_groups, rotate_attention, runs
from ofadiff.commands.command import main, script


def compress(
    *,
    model: runs.Model,
    calls: runs.Calls = runs.Calls(),
    data: runs.Data = runs.Data(),
    captions: runs.Captions = runs.Captions(),
    classes: runs.Classes = runs.Classes(),
    output: runs.Output,
    compression: runs.Compression = runs.Compression(),
    losses: runs.Losses = runs.Losses(),
    optimization: runs.Optimization = runs.Optimization(),
    watching: runs.Watching = runs.Watching(),
) -> runs.TrainingResult:
    """Compress a pipeline of any class to several sizes in one joint training run, on recordings of its own calls.

    Images may be mixed in where the pipeline can be trained on them as well.
    """
    training = {"losses": losses, "optimization": optimization, "watching": watching}
    given = {"captions": captions, "classes": classes, "calls": calls, "compression": compression, **training}
    settings = runs.RunSettings(model, data, output, **given)

    # The original: its pipeline samples the calls, and what its denoiser answered in them is what will be learnt.
    run = runs.start_recorded(settings)
    denoiser = run.denoiser

    supernet = runs.resumed_supernet(run)
    if supernet is None:
        # Every internal width that can shrink; attention heads in their singular basis.
        groups = find_channel_groups(denoiser)
        if compression.rotate:
            rotate_attention(denoiser, groups)

        # What each channel does to the output. Equation 5: how many of them each layer keeps at a size.
        latencies = runs.measure_latency(run, groups)  # if sizes are shares of it
        scores = runs.score(run, groups)
        subnets = runs.choose_sizes(run, groups, scores, latencies)

        # Sorted once, so that every subnet is a prefix.
        supernet = Supernet(denoiser, groups, scores, subnets, runs.provenance(run))
        # In closed form: what is left of each branch gives what the original's gives.
        runs.correct(run, supernet)
    runs.show_sizes(run, supernet)

    # Equation 6: one subnet per step, taught by what the original answered.
    result = runs.train_jointly(run, supernet)

    # The original pipeline, with the supernet in place of its denoiser.
    runs.save(run, supernet, result)
    return result


if __name__ == "__main__":
    main(script(compress, __file__))

"""Compresses a pixel diffusion model (an unconditional or class-conditional `UNet2DModel`) to several sizes at once.

    accelerate launch recipes/compress_ddpm.py --pretrained_model_name_or_path DIR --train_data_dir IMAGES \
        --sizes 0.4 0.6 0.8 1.0 --output_dir OUT

makes a diffusers pipeline folder that holds all sizes in one set of weights; `OFAPipeline.from_pretrained("OUT")` loads
it, and its call takes `size=0.4`.
"""

from __future__ import annotations

from ofadiff import Supernet, find_channel_groups, rotate_attention, runs
from ofadiff.commands.command import main, script
from ofadiff.denoisers.unet_2d import UNET_2D


def compress(
    *,
    model: runs.Model,
    data: runs.Data = runs.Data(),
    output: runs.Output,
    classes: runs.Classes = runs.Classes(),
    compression: runs.Compression = runs.Compression(),
    losses: runs.Losses = runs.Losses(),
    optimization: runs.Optimization = runs.Optimization(),
    watching: runs.Watching = runs.Watching(),
) -> runs.TrainingResult:
    """Compress a pixel diffusion model to several sizes in one joint training run."""
    bundles = {"classes": classes, "compression": compression, "losses": losses}
    settings = runs.RunSettings(model, data, output, **bundles, optimization=optimization, watching=watching)

    # The original: its pipeline, images that fit it, and a frozen copy that teaches.
    run = runs.start(settings, kinds=[UNET_2D])
    unet = run.denoiser

    supernet = runs.resumed_supernet(run)
    if supernet is None:
        # Every internal width that can shrink; attention heads in their singular basis.
        groups = find_channel_groups(unet)
        if compression.rotate:
            rotate_attention(unet, groups)

        # Equation 4: what each channel is worth. Equation 5: how many of them each layer keeps at a size.
        latencies = runs.measure_latency(run, groups)  # if sizes are shares of it
        scores = runs.score(run, groups)
        subnets = runs.choose_sizes(run, groups, scores, latencies)

        # Sorted once, so that every subnet is a prefix.
        supernet = Supernet(unet, groups, scores, subnets, runs.provenance(run))
        # In closed form: what is left of each branch gives what the original's gives.
        runs.correct(run, supernet)
    runs.show_sizes(run, supernet)

    # Equation 6: one subnet per step, taught by the images and by the original.
    result = runs.train_jointly(run, supernet)

    # The original pipeline, with the supernet in place of its denoiser.
    runs.save(run, supernet, result)
    return result


if __name__ == "__main__":
    main(script(compress, __file__))

"""`ofadiff compress`: one joint run for all sizes, of any pipeline that can be trained."""

from __future__ import annotations

from collections.abc import Sequence

from ofadiff.basis.rotation import rotate_attention
from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.runs.correction import correct
from ofadiff.runs.joint import train_jointly
from ofadiff.runs.recorded import start_recorded
from ofadiff.runs.result import save
from ofadiff.runs.run import Run, start
from ofadiff.runs.settings import (
    Calls,
    Captions,
    Classes,
    Compression,
    Data,
    Losses,
    Model,
    Optimization,
    Output,
    RunSettings,
    Watching,
)
from ofadiff.runs.sizes import choose_sizes, measure_latency, provenance, resumed_supernet, score, show_sizes
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import TrainingResult
from ofadiff.unet_elastic import find_channel_groups


def compress(
    *,
    model: Model,
    data: Data = Data(),
    output: Output,
    captions: Captions = Captions(),
    classes: Classes = Classes(),
    calls: Calls = Calls(),
    compression: Compression = Compression(),
    losses: Losses = Losses(),
    optimization: Optimization = Optimization(),
    watching: Watching = Watching(),
) -> TrainingResult:
    """Compress a pretrained pipeline to several sizes in one joint training run.

    Text-to-image models and models of pixels are trained on images. A pipeline of any class is trained on recordings of
    its own calls, without any data: give them with `--calls_file`. On several processes: `accelerate launch -m ofadiff
    compress …`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    settings = RunSettings(
        model=model,
        data=data,
        output=output,
        captions=captions,
        classes=classes,
        calls=calls,
        compression=compression,
        losses=losses,
        optimization=optimization,
        watching=watching,
    )
    return compress_with(settings)


def compress_with(settings: RunSettings, kinds: Sequence[DenoiserKind] | None = None) -> TrainingResult:
    """The whole of a compression; see `compress`."""
    run = start_recorded(settings) if settings.calls.given else start(settings, kinds)
    supernet = make_supernet(run)
    result = train_jointly(run, supernet)
    save(run, supernet, result)
    return result


def make_supernet(run: Run) -> Supernet:
    """Rotates, ranks, and gives every size its widths; or takes all that from the checkpoint to resume from."""
    supernet = resumed_supernet(run)
    if supernet is None:
        groups = find_channel_groups(run.denoiser)
        if run.settings.compression.rotate:
            rotate_attention(run.denoiser, groups)
        latencies = measure_latency(run, groups)
        scores = score(run, groups)
        subnets = choose_sizes(run, groups, scores, latencies)
        supernet = Supernet(run.denoiser, groups, scores, subnets, provenance(run))
        correct(run, supernet)
    show_sizes(run, supernet)
    return supernet

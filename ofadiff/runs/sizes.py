"""How a run finds its sizes: checked before any weight is loaded, scored by all processes, or resumed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence

import torch
from accelerate.utils import broadcast_object_list, send_to_device

from ofadiff.allocation import allocate, ladders
from ofadiff.channels import ChannelGroup
from ofadiff.data.captioned_stream import TextToImageStream
from ofadiff.data.mixed_samples import MixedSamples
from ofadiff.data.order import fixed_batches
from ofadiff.denoisers.copies import copy_in
from ofadiff.dtypes import PRECISIONS
from ofadiff.importance import score_channels
from ofadiff.noise.draws import Batch
from ofadiff.profiling.latency import LatencyCosts, latency_table, measure_latency_costs
from ofadiff.runs.run import Run
from ofadiff.runs.size_checks import check_sizes
from ofadiff.runs.tables import latency_rows, size_table
from ofadiff.sizes import SizeTable
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import Schedule
from ofadiff.training.checkpoint import DENOISER, check_same_run
from ofadiff.training.layer_by_layer import on_device
from ofadiff.training.losses import denoised, denoising_loss
from ofadiff.training.train import run_values


def score(run: Run, groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
    """Importance of every unit: each process takes its share of the samples, and all get the mean over all samples.

    Args:
        run: Its denoiser is the original one.
        groups: The denoiser's channel groups.

    Returns:
        What `score_channels` does.
    """
    accelerator, compression, optimization = run.accelerator, run.settings.compression, run.settings.optimization
    if optimization.gradient_checkpointing:
        run.denoiser.enable_gradient_checkpointing()
    options = compression.criterion_options()
    # A threshold is a share of the largest loss of all: then every process looks at all samples.
    alone = bool(options.get("loss_threshold"))
    share = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batch_size = compression.importance_batch_size or optimization.train_batch_size
    training, count = run.data.training, compression.importance_samples
    data = training.first(count) if isinstance(training, TextToImageStream) else training
    # Images have losses, answers have none: what is ranked by is the answers.
    data = data.recorded if isinstance(data, MixedSamples) else data
    batches: Iterable[Batch] = fixed_batches(data, count, batch_size, optimization.seed, "importance", *share)
    if run.recordings is not None:
        batches = ({**batch, "parts": [part]} for batch in batches for part in batch["parts"])
    by_output = compression.criterion == "sensitivity"
    samples = len(range(count)[share[0] :: share[1]])
    # bfloat16 ranks as float32 does; float16's gradients would need scaling.
    half = accelerator.mixed_precision == "bf16"
    scores = {group.name: torch.zeros(group.width) for group in groups}
    if samples:
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half)
        with on_device(accelerator, run.denoiser), autocast:
            scores = score_channels(
                run.denoiser,
                groups,
                (send_to_device(batch, accelerator.device) for batch in batches),
                functools.partial(denoised if by_output else denoising_loss, prepare=run.prepare),
                compression.criterion or "",
                **options,
            )
    if alone or accelerator.num_processes == 1:
        return scores
    sums = {name: each * samples for name, each in scores.items()}
    counts = torch.tensor(float(samples), device=accelerator.device)
    sums = accelerator.reduce(send_to_device(sums, accelerator.device), "sum")
    total = accelerator.reduce(counts, "sum")
    return {name: (summed / total).cpu() for name, summed in sums.items()}


def measure_latency(run: Run, groups: Sequence[ChannelGroup]) -> LatencyCosts | None:
    """What groups cost in time, in the precision of the run, if sizes are shares of it; one process measures for all.

    Raises:
        ValueError: If the sizes cannot be met.
    """
    accelerator, compression = run.accelerator, run.settings.compression
    if compression.budget != "latency":
        return None
    measured: list[LatencyCosts | None] = [None]
    accelerator.wait_for_everyone()  # nobody works beside it
    if accelerator.is_main_process:
        timed = copy_in(run.denoiser, PRECISIONS[accelerator.mixed_precision]).to(accelerator.device).eval()
        measured = [measure_latency_costs(timed, groups, ladders(groups, compression.min_keep), run.recordings)]
    latencies = broadcast_object_list(measured)[0]
    check_sizes(compression, run.denoiser, latencies, run.recordings)
    return latencies


def choose_sizes(
    run: Run, groups: Sequence[ChannelGroup], scores: dict[str, torch.Tensor], latencies: LatencyCosts | None
) -> SizeTable:
    """The subnets that were asked for, see `allocate`; what they miss is said once."""
    compression = run.settings.compression
    with warnings.catch_warnings():
        if not run.accelerator.is_main_process:  # one process speaks
            warnings.simplefilter("ignore", UserWarning)
        sizes, budget, min_keep = compression.sizes, compression.budget, compression.min_keep
        which = run.denoiser, groups, scores, sizes, budget, min_keep
        return allocate(*which, inputs=run.recordings, latencies=latencies)


def provenance(run: Run) -> dict[str, object]:
    """What the checkpoint remembers of how it was made."""
    compression, optimization = run.settings.compression, run.settings.optimization
    return {
        "teacher": run.original.name,
        "criterion": compression.criterion,
        "importance_samples": compression.importance_samples,
        "rotate": compression.rotate,
        "correction_samples": compression.correction_samples,
        "correction_rank": compression.correction_rank,
        "reweight": compression.reweight,
        "max_train_steps": optimization.max_train_steps,
        "seed": optimization.seed,
        **compression.criterion_options(),
        **compression.strategy_options(),
    }


def show_sizes(run: Run, supernet: Supernet) -> None:
    """Prints what the sizes have; of sizes in latency also what they take, measured."""
    accelerator = run.accelerator
    if run.settings.compression.budget == "latency" and run.checkpoint is None:
        accelerator.wait_for_everyone()  # nobody works beside it
        if accelerator.is_main_process:
            measured = latency_table(supernet, run.recordings, PRECISIONS[accelerator.mixed_precision])
            print(latency_rows(supernet.subnets, measured), end="\n\n")
        accelerator.wait_for_everyone()
    accelerator.print(size_table(supernet.subnets))


def resumed_supernet(run: Run) -> Supernet | None:
    """The supernet of the checkpoint to resume from, if there is one.

    Raises:
        ValueError: If it is another run's, or has other sizes than are asked for.
    """
    checkpoint, compression = run.checkpoint, run.settings.compression
    if checkpoint is None:
        return None
    check_same_run(checkpoint, run_values(run.accelerator, run.data.training, schedule_of(run)))
    supernet = Supernet.from_pretrained(checkpoint / DENOISER)
    subnets = supernet.subnets
    saved = {"sizes": list(supernet.sizes), "budget": subnets.budget, "min_keep": subnets.min_keep}
    asked = {"sizes": sorted(compression.sizes), "budget": compression.budget, "min_keep": compression.min_keep}
    for name in saved:
        if saved[name] != asked[name]:
            raise ValueError(f"cannot resume from {checkpoint}: its --{name} is {saved[name]}, not {asked[name]}")
    if run.original.kind.begin_training is not None:
        run.original.kind.begin_training(supernet.model)
    run.accelerator.print(f"Resuming from {checkpoint}")
    return supernet


def schedule_of(run: Run) -> Schedule:
    """How long and in which steps the run trains."""
    optimization, compression = run.settings.optimization, run.settings.compression
    one = run.settings.one_size is not None
    assert optimization.max_train_steps is not None and optimization.ema_decay is not None
    strategy = "uniform" if one else compression.reweight
    assert strategy is not None and run.settings.losses.stratify_timesteps is not None
    return Schedule(
        max_train_steps=optimization.max_train_steps,
        train_batch_size=optimization.train_batch_size,
        seed=optimization.seed,
        strategy=strategy,
        strategy_options={} if one else compression.strategy_options(),
        stratify_timesteps=run.settings.losses.stratify_timesteps,
        max_grad_norm=optimization.max_grad_norm,
        max_skipped_steps=optimization.max_skipped_steps,
        ema_decay=optimization.ema_decay,
        offload_ema=optimization.offload_ema,
        num_workers=run.settings.data.dataloader_num_workers,
    )

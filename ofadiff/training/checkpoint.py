"""Checkpoints of a training run, in safetensors and JSON, from which it goes on as if it had never stopped.

`torch.distributed.checkpoint` and accelerate's `save_state` would do that too, but both pickle something: the one its
metadata, the other random states. And neither knows the average of the weights, or whether it is the same run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofadiff.data.stream import Place
from ofadiff.supernet import Supernet
from ofadiff.training.sharding import gather_like, gather_to_cpu, shard, shard_like
from ofadiff.training.single_size import SingleSize, trained_weights

DENOISER = "denoiser"

# What an optimizer is made with. The learning rate is that at the start; the scheduler changes the other one.
SETTINGS = {
    "initial_lr": "learning rate",
    "betas": "betas",
    "eps": "epsilon",
    "weight_decay": "weight decay",
    "momentum": "momentum",
}


@dataclass
class TrainingState:
    """Everything about a run that a checkpoint holds.

    Attributes:
        supernet: With the weights in training, not their average; or one size in training.
        ema: The average of the weights.
        optimizer: Over the supernet's parameters.
        lr_scheduler: The optimizer's learning rate.
        scaler: Gradient scaler, in float16 only.
        run: Plain values on which the order of sizes, samples and noise depends; a resumed run must have the same.
        flags: Plain values that whoever runs this was asked for; a checkpoint keeps them, and `check_flags` reads them.
        step: Optimizer steps made.
        seconds: Time they took.
        history: Validation losses, {step: {size: loss}}.
        place: Where to read on, of streamed data only.
        unreadable: Samples so far that could not be read, so that others took their place.
        skeleton: `without_weights` of the supernet, only where FSDP splits its weights over processes. The average is
            then one of each process' shards.
    """

    supernet: Supernet | SingleSize
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None
    run: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    history: dict[int, dict[float, float]] = field(default_factory=dict)
    place: Place | None = None
    unreadable: int = 0
    skeleton: Supernet | None = None


def save_checkpoint(
    state: TrainingState, output_dir: str | Path, total_limit: int | None = None, write: bool = True
) -> Path:
    """Writes `checkpoint-{step}` into a folder, and removes the oldest ones beyond `total_limit`.

    The checkpoint is made under a hidden name and then renamed: a killed run leaves whole checkpoints only. It is the
    same whether FSDP splits the weights or not.

    Args:
        state: State of the run.
        output_dir: Where to write it.
        total_limit: How many checkpoints are kept; None for all.
        write: Whether this process writes. Of several, all have to call this, and one writes.

    Returns:
        The checkpoint's folder. A supernet's `denoiser/` in it is one for `Supernet.from_pretrained`.
    """
    output_dir = Path(output_dir)
    checkpoint = output_dir / f"checkpoint-{state.step}"
    unfinished = output_dir / f".checkpoint-{state.step}"
    supernet = whole_supernet(state, keep=write)
    averages = gather_to_cpu(_averages(state), keep=write)
    optimizer = state.optimizer.state_dict()
    entries = dict(_flat(optimizer["state"]))
    # A file cannot hold one tensor under two names, and 8-bit optimizers share their tables: so each gets its own.
    tensors = gather_to_cpu(((key, value) for key, value in entries.items() if isinstance(value, Tensor)), keep=write)
    if not write:
        return checkpoint

    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)

    supernet.save_pretrained(unfinished / DENOISER)
    save_file(averages, unfinished / "ema.safetensors")
    save_file(tensors, unfinished / "optimizer.safetensors")
    rest = {
        "run": state.run,
        "flags": state.flags,
        "step": state.step,
        "seconds": state.seconds,
        "history": state.history,
        "place": state.place,
        "unreadable": state.unreadable,
        "ema_steps": state.ema.optimization_step,
        "optimizer": {key: value for key, value in entries.items() if key not in tensors},
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
    }
    (unfinished / "state.json").write_text(json.dumps(rest, indent=2) + "\n")

    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(unfinished, checkpoint)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return checkpoint


def load_checkpoint(state: TrainingState, checkpoint: str | Path) -> None:
    """Brings a freshly built state to where the checkpoint was written.

    Raises:
        ValueError: If this is no checkpoint, or one of another run: other sizes, widths, order of channels, seed,
            learning rate, weight decay, ….
    """
    checkpoint = Path(checkpoint)
    check_same_run(checkpoint, state.run)
    _check_optimizer(checkpoint, state.optimizer)
    if isinstance(state.supernet, SingleSize):
        state.supernet.load(checkpoint / DENOISER)
    else:
        _load_supernet(state.supernet, checkpoint)
    saved = json.loads((checkpoint / "state.json").read_text())

    averages = load_file(checkpoint / "ema.safetensors")
    trained = trained_weights(state.supernet.model)
    for (name, weight), average in zip(trained.items(), state.ema.shadow_params, strict=True):
        average.copy_(shard(shard_like(weight, averages[name])))
    entries = {**load_file(checkpoint / "optimizer.safetensors"), **saved["optimizer"]}
    optimizer_state = {int(index): values for index, values in _nested(entries).items()}
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    for index, values in optimizer_state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weights[index].shape:
                values[name] = shard_like(weights[index], value)
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": saved["param_groups"]})
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.ema.optimization_step = saved["ema_steps"]
    state.step = saved["step"]
    state.seconds = saved["seconds"]
    state.place = None if saved["place"] is None else tuple(saved["place"])
    state.unreadable = saved.get("unreadable", 0)
    state.history = {
        int(step): {float(size): loss for size, loss in losses.items()} for step, losses in saved["history"].items()
    }


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any]) -> None:
    """Raises ValueError unless the checkpoint was written by a run with these values."""
    path = Path(checkpoint) / "state.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {path.name}")
    saved = json.loads(path.read_text())["run"]
    for name in sorted(saved.keys() | run.keys()):
        _check(Path(checkpoint), name, saved.get(name), run.get(name))


def read_flags(checkpoint: str | Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was asked for; older ones have kept nothing."""
    path = Path(checkpoint) / "state.json"
    return json.loads(path.read_text(encoding="utf-8")).get("flags", {}) if path.is_file() else {}


def check_flags(checkpoint: str | Path, flags: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Raises ValueError if a run was asked for something else than the one that wrote a checkpoint.

    Args:
        checkpoint: The checkpoint's folder; older ones have kept no flags.
        flags: What the run is asked for.
        may_change: Those that do not decide what is trained, or that hold from the next step on.
    """
    saved = read_flags(checkpoint)
    for name in sorted(saved.keys() & flags.keys() - set(may_change)):
        given = json.loads(json.dumps(flags[name], default=str))
        if saved[name] != given:
            raise ValueError(
                f"cannot resume from {checkpoint}: its --{name} is {saved[name]}, not {given}; a resumed run is the "
                f"same run, only these may change: {', '.join(sorted(may_change))}"
            )


def _check_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer was made with other settings than the checkpoint's, which replace them."""
    saved = json.loads((checkpoint / "state.json").read_text())["param_groups"]
    for theirs, ours in zip(saved, optimizer.param_groups, strict=True):
        for name in SETTINGS:
            if name in theirs and name in ours:
                value = list(ours[name]) if isinstance(ours[name], tuple) else ours[name]
                _check(checkpoint, SETTINGS[name], theirs[name], value)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        resume: `"latest"`, a checkpoint's folder or its name in the run's folder, or None.

    Returns:
        None where `resume` is, and for `"latest"` where there is none yet.

    Raises:
        ValueError: If the named folder is not a checkpoint.
    """
    if resume is None:
        return None
    if resume == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    for checkpoint in (Path(output_dir) / resume, Path(resume)):
        if (checkpoint / "state.json").is_file():
            return checkpoint
    known = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise ValueError(
        f"{resume} is not a checkpoint to resume from; expected a checkpoint-N folder, or 'latest'; in {output_dir} "
        f"there is {known}"
    )


def whole_supernet(state: TrainingState, keep: bool = True) -> Supernet | SingleSize:
    """What is trained, with whole weights; without any where they are split and `keep` is off.

    All processes have to call it together.
    """
    if state.skeleton is None:
        return state.supernet
    weights = gather_to_cpu(state.supernet.model.state_dict().items(), keep)
    if keep:
        state.skeleton.model.load_state_dict(weights, assign=True)
    return state.skeleton


def _averages(state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    trained = trained_weights(state.supernet.model)
    for (name, weight), average in zip(trained.items(), state.ema.shadow_params, strict=True):
        yield name, gather_like(weight, average)


def _flat(values: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a dict of dicts, by its path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in entries.items():
        *outer, name = path.split(".")
        place = nested
        for step in outer:
            place = place.setdefault(step, {})
        place[name] = value
    return nested


def _load_supernet(supernet: Supernet, checkpoint: Path) -> None:
    saved = Supernet.from_pretrained(checkpoint / DENOISER)
    _check(checkpoint, "sizes", saved.sizes, supernet.sizes)
    for theirs, ours in zip(saved.subnets, supernet.subnets, strict=True):
        for group, width in ours.widths.items():
            _check(checkpoint, f"width of {group} at size {ours.size:g}", theirs.widths.get(group), width)
    if saved.basis.keys() != supernet.basis.keys() or not all(
        torch.equal(saved.basis[name].double(), supernet.basis[name].cpu().double()) for name in saved.basis
    ):
        raise ValueError(
            f"cannot resume from {checkpoint}: its channels are in another order or basis than this run's; build the "
            f"supernet with Supernet.from_pretrained({str(checkpoint / DENOISER)!r})"
        )
    ours, weights = supernet.model.state_dict(), saved.model.state_dict()
    supernet.model.load_state_dict({name: shard_like(ours[name], weight) for name, weight in weights.items()})


def _check(checkpoint: Path, name: str, saved: Any, given: Any) -> None:
    if saved != given:
        raise ValueError(f"cannot resume from {checkpoint}: its {name} is {saved}, this run's is {given}")

"""Checkpoints of a training run, in safetensors and JSON, from which it goes on as if it had never stopped.

`torch.distributed.checkpoint` and accelerate's `save_state` would do that too, but both pickle something: the one its
metadata, the other random states. And neither knows the average of the weights, or whether it is the same run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor

from ofadiff.data.stream import Place
from ofadiff.reading.json_file import check_object, read_json, read_object, shown
from ofadiff.reading.tensors import open_tensors
from ofadiff.storage.sealed import DIGESTS_NAME, find_fault, remove, sealed_aside
from ofadiff.storage.split import gather, write_whole
from ofadiff.supernet import Supernet
from ofadiff.training.sharding import part_of, shard, shard_like
from ofadiff.training.single_size import SingleSize, trained_weights

logger = logging.getLogger(__name__)

DENOISER = "denoiser"

STATE_NAME = "state.json"

# A checkpoint's folder, or one that was being replaced when a kill came.
NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)-replaced")

# What an optimizer is made with. The learning rate is that at the start; the scheduler changes the other one.
SETTINGS = {
    "initial_lr": "learning rate",
    "betas": "betas",
    "eps": "epsilon",
    "weight_decay": "weight decay",
    "momentum": "momentum",
}

# What it says beside tensors; what the second one names older checkpoints have not kept, or it may be null.
STATE: dict[str, type] = {
    "run": dict,
    "step": int,
    "seconds": float,
    "history": dict,
    "ema_steps": int,
    "optimizer": dict,
    "param_groups": list,
    "lr_scheduler": dict,
}
OPTIONAL: dict[str, type] = {
    "flags": dict,
    "place": list,
    "unreadable": int,
    "skipped": int,
    "skipped_in_row": int,
    "validation_missing": bool,
    "scaler": dict,
}


# Values of a run that older checkpoints have not kept, as they were then.
BEFORE = {"stratify_timesteps": False}


@dataclass
class TrainingState:
    """Everything about a run that a checkpoint holds.

    Attributes:
        supernet: With the weights in training, not their average; or one size in training.
        ema: The average of the weights; where FSDP splits them over processes, of this process' shards.
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
        skipped: Steps so far whose loss or gradient was not finite, so that nothing was changed.
        skipped_in_row: Those among them that came last, one after the other.
        validation_missing: Whether a signal has come before a validation that was due.
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
    skipped: int = 0
    skipped_in_row: int = 0
    validation_missing: bool = False


def save_checkpoint(
    state: TrainingState, output_dir: str | Path, total_limit: int | None = None, write: bool = True
) -> Path:
    """Writes `checkpoint-{step}` into a folder, and removes the oldest ones beyond `total_limit`.

    The checkpoint is made under a hidden name, with a digest of every file, and renamed once it is on the disk: a
    killed run leaves whole checkpoints only. It is the same whether FSDP splits the weights or not. Torn checkpoints
    do not count among those that are kept.

    Args:
        state: State of the run.
        output_dir: Where to write it.
        total_limit: How many checkpoints are kept; None for all.
        write: Whether this process writes. Of several, all have to call this, and one writes.

    Returns:
        The checkpoint's folder. A supernet's `denoiser/` in it is one for `Supernet.from_pretrained`.

    Raises:
        OSError: If it cannot be written, such as for want of room. The others stay as they were.
    """
    output_dir = Path(output_dir)
    checkpoint = output_dir / f"checkpoint-{state.step}"
    optimizer = state.optimizer.state_dict()
    entries = dict(_flat(optimizer["state"]))
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not write:
        _write_tensors(state, tensors, None)
        return checkpoint

    rest = {
        "run": state.run,
        "flags": state.flags,
        "step": state.step,
        "seconds": state.seconds,
        "history": state.history,
        "place": state.place,
        "unreadable": state.unreadable,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "validation_missing": state.validation_missing,
        "ema_steps": state.ema.optimization_step,
        "optimizer": {key: value for key, value in entries.items() if key not in tensors},
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "digests": DIGESTS_NAME,
    }
    _remove_leftovers(output_dir)
    with _said_what_is_left(checkpoint), sealed_aside(checkpoint) as unfinished:
        _write_tensors(state, tensors, unfinished)
        (unfinished / STATE_NAME).write_text(json.dumps(rest, indent=2) + "\n")
    if total_limit is not None:
        _keep_newest(checkpoint, total_limit)
    return checkpoint


def load_checkpoint(state: TrainingState, checkpoint: str | Path) -> None:
    """Brings a freshly built state to where the checkpoint was written.

    Raises:
        ValueError: If this is no checkpoint, or one of another run: other sizes, widths, order of channels, seed,
            learning rate, weight decay, …; or if one of its files is not what a checkpoint has.
    """
    checkpoint = Path(checkpoint)
    check_same_run(checkpoint, state.run)
    _check_optimizer(checkpoint, state.optimizer)
    if isinstance(state.supernet, SingleSize):
        state.supernet.load(checkpoint / DENOISER)
    else:
        _load_supernet(state.supernet, checkpoint)
    saved = read_state(checkpoint, *STATE)

    trained = trained_weights(state.supernet.model)
    file = checkpoint / "ema.safetensors"
    with open_tensors(file) as averages:
        for (name, weight), average in zip(trained.items(), state.ema.shadow_params, strict=True):
            value = averages.get_tensor(name)
            _check(checkpoint, f"shape of {name} in {file.name}", tuple(value.shape), tuple(weight.shape))
            average.copy_(shard(shard_like(weight, value)))
    optimizer_state = _read_optimizer(checkpoint, state.optimizer, saved["optimizer"])
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": saved["param_groups"]})
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler is not None:
        if saved.get("scaler") is None:
            raise ValueError(f"cannot resume from {checkpoint}: it has no gradient scaler, which float16 needs")
        state.scaler.load_state_dict(saved["scaler"])
    state.ema.optimization_step = saved["ema_steps"]
    state.step = saved["step"]
    state.seconds = saved["seconds"]
    state.place = None if saved.get("place") is None else tuple(saved["place"])
    state.unreadable = saved.get("unreadable", 0)
    state.skipped, state.skipped_in_row = saved.get("skipped", 0), saved.get("skipped_in_row", 0)
    state.validation_missing = saved.get("validation_missing", False)
    state.history = _read_history(checkpoint, saved["history"])


def read_state(checkpoint: str | Path, *names: str) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Args:
        checkpoint: Its folder.
        names: Those of `STATE` that it must say.

    Raises:
        ValueError: If it does not say that, or the folder is no checkpoint.
    """
    path = Path(checkpoint) / STATE_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {path.name}")
    saved = read_object(path, {name: STATE[name] for name in names})
    check_object(saved, str(path), {}, OPTIONAL)
    return saved


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any]) -> None:
    """Raises ValueError unless the checkpoint was written by a run with these values."""
    saved = read_state(checkpoint, "run")["run"]
    for name in sorted(saved.keys() | run.keys()):
        _check(Path(checkpoint), name, saved.get(name, BEFORE.get(name)), run.get(name))


def read_flags(checkpoint: str | Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was asked for; older ones have kept nothing."""
    return read_state(checkpoint).get("flags") or {} if (Path(checkpoint) / STATE_NAME).is_file() else {}


def read_step(checkpoint: str | Path) -> int:
    """The optimizer steps that a checkpoint's run had made."""
    return read_state(checkpoint, "step")["step"]


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


def _read_history(checkpoint: Path, saved: Mapping[str, Any]) -> dict[int, dict[float, float]]:
    """Validation losses, whose steps and sizes JSON keeps as text."""
    where = f"the history in {checkpoint / STATE_NAME}"
    history = {}
    for step, losses in saved.items():
        check_object(losses, f"step {shown(step)} of {where}", {})
        try:
            history[int(step)] = {float(size): float(loss) for size, loss in losses.items()}
        except (TypeError, ValueError):
            raise ValueError(
                f"{where} has at step {shown(step)} {shown(losses)}; it must be a loss for every size"
            ) from None
    return history


def _check_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer was made with other settings than the checkpoint's, which replace them."""
    saved = read_state(checkpoint, "param_groups")["param_groups"]
    _check(checkpoint, "number of the optimizer's groups of weights", len(saved), len(optimizer.param_groups))
    for theirs, ours in zip(saved, optimizer.param_groups, strict=True):
        check_object(theirs, f"a group of weights in {checkpoint / STATE_NAME}", {"params": list})
        for name in SETTINGS:
            if name in theirs and name in ours:
                value = list(ours[name]) if isinstance(ours[name], tuple) else ours[name]
                _check(checkpoint, SETTINGS[name], theirs[name], value)


def _read_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """What a checkpoint's optimizer holds for every weight, split as the weights are; read tensor by tensor.

    Args:
        checkpoint: The checkpoint's folder.
        optimizer: Over the same weights.
        rest: What it holds beside tensors.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    entries = dict(rest)
    file = checkpoint / "optimizer.safetensors"
    with open_tensors(file) as tensors:
        for key in [*rest, *tensors.keys()]:
            index, _, what = key.partition(".")
            if not (what and index.isdecimal() and int(index) < len(weights)):
                raise ValueError(
                    f"cannot resume from {checkpoint}: its optimizer holds {shown(key)}; names begin with the number "
                    f"of a weight, below {len(weights)}, and a dot"
                )
            if key not in rest:
                weight, value = weights[int(index)], tensors.get_tensor(key)
                entries[key] = shard_like(weight, value) if value.shape == weight.shape else value
    return {int(index): values for index, values in _nested(entries).items()}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step, whole or torn."""
    found = {path: NAME.fullmatch(path.name) for path in Path(output_dir).glob("*checkpoint-*")}
    steps = {path: int(match[1] or match[2]) for path, match in found.items() if match}
    there = {step for path, step in steps.items() if not path.name.startswith(".")}
    # While a checkpoint was being replaced, a kill has left the old one under a hidden name only.
    listed = [path for path, step in steps.items() if not path.name.startswith(".") or step not in there]
    return sorted(listed, key=lambda path: steps[path])


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        resume: `"latest"` for the newest whole one (torn ones are named in a warning and passed over), a checkpoint's
            folder or its name in the run's folder, or None.

    Returns:
        None where `resume` is, and for `"latest"` where there is none yet.

    Raises:
        ValueError: If the named folder is not a checkpoint, or torn; for `"latest"` if every one is torn.
    """
    if resume is None:
        return None
    known = list_checkpoints(output_dir)
    if resume == "latest":
        return _newest_whole(known)
    for checkpoint in (Path(output_dir) / resume, Path(resume)):
        if checkpoint.is_dir() and (NAME.fullmatch(checkpoint.name) or (checkpoint / "state.json").is_file()):
            torn = find_torn(checkpoint)
            if torn is not None:
                raise ValueError(f"cannot resume from {checkpoint}, which is torn: {torn}; 'latest' is a whole one")
            return checkpoint
    names = ", ".join(path.name for path in known) or "none"
    raise ValueError(
        f"{resume} is not a checkpoint to resume from; expected a checkpoint-N folder, or 'latest'; in {output_dir} "
        f"there is {names}"
    )


def find_torn(checkpoint: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are whole, as far as that can be known.

    Args:
        checkpoint: Its folder. Older ones have no digests: of them it is known whether a file is cut short.
        contents: Whether every file is read; otherwise only its length is looked at.
    """
    try:
        saved = read_json(checkpoint / STATE_NAME)
    except FileNotFoundError:
        return f"{STATE_NAME} is missing"
    except ValueError:
        return f"{STATE_NAME} is no JSON"
    if (isinstance(saved, dict) and "digests" in saved) or (checkpoint / DIGESTS_NAME).exists():
        return find_fault(checkpoint, contents)
    for name in ("ema.safetensors", "optimizer.safetensors"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with open_tensors(path):
                pass
        except ValueError as error:
            return f"{path.relative_to(checkpoint)} is not what was written: {error}"
    return None


def _newest_whole(checkpoints: list[Path]) -> Path | None:
    """The last one that is whole; the torn ones behind it are named. Raises ValueError if every one is torn."""
    torn: list[str] = []
    for checkpoint in reversed(checkpoints):
        fault = find_torn(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is torn and passed over: %s", checkpoint, fault)
        torn.append(f"{checkpoint.name} ({fault})")
    if torn:
        raise ValueError(
            f"no checkpoint in {checkpoints[0].parent} is whole: {', '.join(torn)}; bring a whole one back, choose "
            "another output folder, or start anew with --overwrite_output_dir"
        )
    return None


def _remove_leftovers(output_dir: Path) -> None:
    """Removes what kills have left under hidden names, but for the only copy of a checkpoint, which gets its name."""
    for orphan in list_checkpoints(output_dir):
        if orphan.name.startswith("."):
            os.replace(orphan, orphan.with_name(orphan.name[1:].removesuffix("-replaced")))
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover)


@contextmanager
def _said_what_is_left(checkpoint: Path) -> Iterator[None]:
    """What stops a checkpoint from being written is an error that names what a run can go on from."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        whole = [each.name for each in list_checkpoints(checkpoint.parent) if find_torn(each, contents=False) is None]
        left = "there is no earlier checkpoint"
        if whole:
            left = f"{whole[-1]} is whole: mend that, and go on with --resume_from_checkpoint latest"
        raise OSError(f"cannot write {checkpoint}: {error}; {left}") from error


def _keep_newest(newest: Path, total_limit: int) -> None:
    """Removes the oldest checkpoints beyond a number of whole ones, of which the newest is one."""
    others = [each for each in list_checkpoints(newest.parent) if each != newest]
    others = [each for each in others if find_torn(each, contents=False) is None]
    for old in others[: max(0, len(others) + 1 - total_limit)]:
        remove(old)


def _write_tensors(state: TrainingState, optimizer: Mapping[str, Tensor], folder: Path | None) -> None:
    """Writes weights, their average and what the optimizer holds, no more than one whole tensor at a time.

    Args:
        state: State of the run.
        optimizer: Tensors of the optimizer's state, by the names under which they are kept.
        folder: Where to; None in a process that hands over its parts, if weights are split.
    """
    if isinstance(state.supernet, Supernet):
        target = Path(DENOISER) if folder is None else folder / DENOISER
        state.supernet.save_pretrained(target, is_main_process=folder is not None)
    elif folder is not None:
        state.supernet.save_pretrained(folder / DENOISER)
    trained = trained_weights(state.supernet.model)
    averages = dict(zip(trained, state.ema.shadow_params, strict=True))
    like = {name: torch.empty(trained[name].shape, dtype=averages[name].dtype, device="meta") for name in trained}
    file = None if folder is None else folder / "ema.safetensors"
    write_whole(file, like, lambda name: gather(part_of(trained[name], averages[name])))
    # A file cannot hold one tensor under two names, and 8-bit optimizers share their tables: so each gets its own.
    like = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in optimizer.items()}
    file = None if folder is None else folder / "optimizer.safetensors"
    write_whole(file, like, lambda key: gather(optimizer[key]))


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

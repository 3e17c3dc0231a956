"""Kills training runs from outside, starts them again, and compares what they leave with a run never killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]

# Where what is started finds modules of tests.
PATHS = (ROOT, ROOT / "tests", ROOT / "tests" / "unet_elastic")

# A process that does not end in so many seconds never will.
PATIENCE = 600


@dataclass
class Launch:
    """How a recipe is started; `words` are its flags without those of the output folder and of resuming."""

    recipe: str
    words: list
    processes: int = 1
    sharded: bool = False

    def options(self, folder, resume=True, also=()):
        words = [*self.words, "--output_dir", folder, "--report_to", "tensorboard", *also]
        words += ["--resume_from_checkpoint", "latest"] if resume else []
        return {"recipe": self.recipe, "words": list(map(str, words)), "processes": self.processes,
                "sharded": self.sharded}  # fmt: skip


@dataclass
class Nursery:
    """The process that others are forked from."""

    folder: Path
    process: subprocess.Popen = field(init=False)
    seconds: float = 0.0  # that the last start took

    def __enter__(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("nursery.py"))]
        with (self.folder / "nursery.log").open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        assert self.answer() == "ready"
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()

    def answer(self):
        line = self.process.stdout.readline()
        assert line, (self.folder / "nursery.log").read_text()
        return json.loads(line)

    def start(self, options, moment=None, seconds=None, number=signal.SIGKILL, which=slice(None)):
        """Runs a recipe to its end, or to a signal from outside.

        Args:
            options: Of `Launch.options`.
            moment: (function of the library, n): the signal comes at its n-th call.
            seconds: The signal comes after so many.
            number: The signal.
            which: Of several processes, those that get it.

        Returns:
            How the processes have ended, and what they have said.
        """
        reached, log = self.folder / "reached", self.folder / "log"
        for leftover in (reached, log):
            leftover.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = {**options, "moment": moment, "reached": str(reached), "log": str(log), "port": port}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        started = time.monotonic()
        pids = self.answer()
        if moment is not None or seconds is not None:
            while alive(pids[0]) and not reached.exists():
                if seconds is not None and time.monotonic() - started > seconds:
                    break
                assert time.monotonic() - started < PATIENCE, log.read_text()
                time.sleep(0.005)
            if number == signal.SIGKILL:
                which = slice(None)
            for pid in pids[which]:
                with suppress(ProcessLookupError):  # it has come to its end before
                    os.kill(pid, number)
            if number != signal.SIGKILL:
                reached.unlink(missing_ok=True)
        ended = self.answer()
        self.seconds = time.monotonic() - started
        return ended, log.read_text() if log.exists() else ""


def alive(pid):
    """Whether a process runs: one that has ended is there until its parent has heard of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def finish(nursery, launch, folder):
    """Starts a run, or goes on with it, and lets it come to its end."""
    ended, log = nursery.start(launch.options(folder))
    assert not any(ended), log
    return log


def sampled_sizes(folder):
    """(step, size) of every step, as the tracker shows it."""
    (logs,) = (folder / "logs").iterdir()
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("size")]


def tensors_of(folder):
    """Every tensor of the result and of the last checkpoint: weights, average and moments."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    found = {}
    for place in (last, next(path.parent for path in folder.glob("*/ofa_config.json"))):
        for file in sorted(place.rglob("*.safetensors")):
            named = load_file(file)
            found |= {f"{file.relative_to(folder)} {name}": tensor for name, tensor in named.items()}
    assert any("optimizer" in name for name in found) and any("ema" in name for name in found)
    return found, json.loads((last / "state.json").read_text())


def assert_same_run(folder, expected, close=None):
    """Weights, average, moments, and the log of sampled sizes are those of another run, bit for bit.

    Args:
        folder: One run's output folder.
        expected: Another's.
        close: How far tensors may be from each other; exactly equal by default.
    """
    (ours, state), (theirs, other) = tensors_of(folder), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if close is None:
            assert torch.equal(ours[name], tensor), name
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=close, msg=lambda said, name=name: name + said)
    for key in ("step", "ema_steps", "run", "place", "optimizer", "param_groups", "lr_scheduler"):
        assert state[key] == other[key], key
    if close is None:
        assert state["history"] == other["history"]
    steps = sampled_sizes(expected)
    assert sampled_sizes(folder) == steps and [step for step, _ in steps] == list(range(1, state["step"] + 1))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

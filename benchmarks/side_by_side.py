"""Two sides timed in turn in one process, one table of their ratios, and the bounds that these have to keep."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ofadiff.profiling.memory import measure_peak_memory
from ofadiff.profiling.timing import processor_name

WARMUP = 2

# What the models run in.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: What is compared.
        ours: One side, with its unit.
        theirs: The other side, or the limit.
        ratio: Ours over theirs; of times the median over rounds.
        spread: Its smallest and largest value in a round, where there are rounds.
        at_most: Bound of the ratio, if it has one.
    """

    what: str
    ours: str
    theirs: str
    ratio: float
    spread: tuple[float, float] | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the ratio keeps its bound; one that is not a number keeps none."""
        return self.at_most is None or self.ratio <= self.at_most


class Comparison:
    """Measures on one device and collects the rows of its table.

    Args:
        device: Where it is measured.
        quick: Only try that everything runs: tiny shapes, and no bounds but those on equality.
        rounds: How often every side is timed.
    """

    def __init__(self, device: torch.device, quick: bool, rounds: int) -> None:
        self.device, self.quick, self.rounds = device, quick, rounds
        self.warmup = 1 if quick else WARMUP
        self.dtype = DTYPES[device.type]
        self.rows: list[Row] = []

    def time_in_turn(self, sides: Mapping[str, Callable[[], Any]], calls: int = 1) -> dict[str, list[float]]:
        """Seconds that a call of every side took in each round.

        All sides run in each round, in reverse order in every other one, so that what else the machine does meets them
        alike.

        Args:
            sides: What is timed, by name.
            calls: Timed together, for sides that are too short for one.
        """
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.warmup + self.rounds):
            for name in list(sides) if number % 2 else reversed(sides):
                self._synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    sides[name]()
                self._synchronize()
                if number >= self.warmup:
                    times[name].append((time.perf_counter() - start) / calls)
        return times

    def add_times(
        self, what: str, ours: Sequence[float], theirs: Sequence[float], at_most: float | None = None
    ) -> None:
        """Compares seconds of the same rounds."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = min(ratios), max(ratios)
        self._add(what, milliseconds(ours), milliseconds(theirs), statistics.median(ratios), spread, at_most)

    def add_time_limit(self, what: str, seconds: Sequence[float], limit: float) -> None:
        """Compares seconds with a limit."""
        ratios = [value / limit for value in seconds]
        spread = min(ratios), max(ratios)
        self._add(what, milliseconds(seconds), milliseconds([limit]), statistics.median(ratios), spread, 1.0)

    def add_memory(self, what: str, ours: float, theirs: float, at_most: float | None = None) -> None:
        """Compares bytes."""
        self._add(what, f"{ours / 2**20:.2f} MiB", f"{theirs / 2**20:.2f} MiB", ours / theirs, None, at_most)

    def add_error(self, what: str, error: float, limit: float) -> None:
        """A relative error and its limit, which holds with `--quick` too."""
        self.rows.append(Row(what, f"{error:.1e}", f"{limit:.0e}", error / limit, None, 1.0))

    def peak_memory(self, models: Iterable[nn.Module], step: Callable[[], Any]) -> int:
        """Peak memory of a step in bytes: weights of the models, and the most that the step holds on top of them."""
        return measure_peak_memory(_Step(models, step), {})

    def table(self) -> str:
        """The rows in Markdown."""
        lines = ["| what | ours | theirs | ratio | spread | bound |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            spread = "" if row.spread is None else f"{row.spread[0]:.3f} – {row.spread[1]:.3f}"
            verdict = "" if row.at_most is None else f"≤ {row.at_most:.3f} {'met' if row.met else 'MISSED'}"
            lines.append(f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio:.3f} | {spread} | {verdict} |")
        return "\n".join(lines)

    def _add(
        self, what: str, ours: str, theirs: str, ratio: float, spread: tuple[float, float] | None, at_most: float | None
    ) -> None:
        self.rows.append(Row(what, ours, theirs, ratio, spread, None if self.quick else at_most))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Step(nn.Module):
    """Makes a training step what `measure_peak_memory` takes: a module's forward."""

    def __init__(self, models: Iterable[nn.Module], step: Callable[[], Any]) -> None:
        super().__init__()
        self.models, self.step = nn.ModuleList(models), step

    def forward(self) -> None:
        with torch.enable_grad():
            self.step()


def milliseconds(seconds: Sequence[float]) -> str:
    """Their median."""
    return f"{statistics.median(seconds) * 1e3:.3g} ms"


def main(
    compare: Callable[[Comparison], None],
    description: str | None,
    argv: Sequence[str] | None = None,
    devices: Sequence[str] = tuple(DTYPES),
) -> int:
    """Runs a benchmark on every device that is there and prints its tables.

    Args:
        compare: Adds the rows.
        description: What the benchmark is about.
        argv: Command line, by default the program's own.
        devices: That it can run on.

    Returns:
        Exit status: 1 if a bound was missed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, help="measure on this one alone (default: all that are there)")
    parser.add_argument("--rounds", type=int, default=20, help="how often every side is timed (default: 20)")
    parser.add_argument("--quick", action="store_true", help="only try that it runs: tiny shapes, no bounds on speed")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    there = [name for name in devices if name == "cpu" or torch.cuda.is_available()]
    if args.device is not None and args.device not in there:
        parser.error(f"--device is {args.device}; this machine has {', '.join(there)}")
    missed = 0
    for name in [args.device] if args.device else there:
        comparison = Comparison(torch.device(name), args.quick, 1 if args.quick else args.rounds)
        print(f"\n{processor_name(comparison.device)}, torch {torch.__version__}, {comparison.dtype}")
        compare(comparison)
        missed += sum(not row.met for row in comparison.rows)
        print(f"\n{comparison.table()}")
    if missed:
        print(f"\n{missed} bound{'s' if missed > 1 else ''} missed")
    return int(missed > 0)

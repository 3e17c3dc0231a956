"""What one of several processes says when it fails, and what each does when it is told to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ofadiff.training.interrupts import PREEMPTING, InterruptedRun, name_of

# Processes that fail let the first one speak for so long: it has to end, which takes seconds on a busy machine, before
# its launcher ends the others.
SECONDS_FOR_THE_FIRST = 15.0


def who_fails() -> str:
    """What stands before the error of one of several processes: its number, nothing for the first.

    Where all of them fail alike, the first one speaks and the launcher ends the others; so those wait for a while.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    time.sleep(SECONDS_FOR_THE_FIRST)
    return f"process {rank}: "


class Preempted(KeyboardInterrupt):
    """One of `PREEMPTING` came, with its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def preemption_as_ctrl_c() -> Iterator[None]:
    """A block in which `PREEMPTING` unwind what is being done, as Ctrl-C does, so that nothing half-made is left.

    Those that somebody handles already stay as they are.
    """
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in PREEMPTING if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _unwind)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise Preempted(number)


def end_by_signal(name: str, stop: KeyboardInterrupt) -> NoReturn:
    """Ends the process that a signal has stopped, with a sentence, of several processes from the first, and 128 + N."""
    number = signal.Signals(stop.number) if isinstance(stop, Preempted) else signal.SIGINT
    said = f"stopped by {name_of(number)}; nothing that was whole is lost: the same command begins again, and training "
    said += "goes on from its last checkpoint with --resume_from_checkpoint latest"
    if isinstance(stop, InterruptedRun):
        number, said = signal.Signals(stop.number), str(stop)
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {said}", file=sys.stderr)
    raise SystemExit(128 + number)

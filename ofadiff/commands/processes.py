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

from ofadiff.training.interrupts import InterruptedRun, name_of

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


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A block in which SIGTERM unwinds what is being done, as Ctrl-C does, so that nothing half-made is left."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def end_by_signal(name: str, stop: KeyboardInterrupt) -> NoReturn:
    """Ends the process that a signal has stopped, with a sentence, of several processes from the first, and 128 + N."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    said = f"stopped by {name_of(number)}; nothing that was whole is lost: the same command begins again, and training "
    said += "goes on from its last checkpoint with --resume_from_checkpoint latest"
    if isinstance(stop, InterruptedRun):
        number, said = signal.Signals(stop.number), str(stop)
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {said}", file=sys.stderr)
    raise SystemExit(128 + number)

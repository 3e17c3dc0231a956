"""Ctrl-C, and what a preempted machine sends: noted, so that what is being done can be finished first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What ends a process when its machine is wanted: SLURM sends SIGUSR1 some time before (`--signal=USR1@120`), where the
# system has it.
PREEMPTING = tuple(signal.Signals[name] for name in ("SIGUSR1", "SIGTERM") if name in signal.Signals.__members__)
# The more pressing one last.
STOPPING = (signal.SIGINT, *PREEMPTING)

# A terminal sends Ctrl-C to all processes, and their launcher passes it on to them: so soon, it is the same one.
SAME_SECONDS = 1.0


class InterruptedRun(KeyboardInterrupt):
    """A signal has ended a run when it had finished what it was doing; the message says how to go on.

    Attributes:
        number: The signal's.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Interrupts:
    """A block in which a signal is noted; a second one does what it would have done without the block.

    Outside the main thread, where Python takes no signals, nothing is noted, and signals that are ignored stay so.

    Attributes:
        received: The number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


@contextmanager
def finished_first(what: str) -> Iterator[None]:
    """A block that a signal ends only when it is through; a second one ends it at once.

    Args:
        what: What is true then, for the message.

    Raises:
        InterruptedRun: After a signal.
    """
    with Interrupts() as interrupts:
        yield
    if interrupts.received is not None:
        raise InterruptedRun(f"stopped by {name_of(interrupts.received)}, but {what}", interrupts.received)


def name_of(number: int) -> str:
    """A signal by the name that a user knows it by."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

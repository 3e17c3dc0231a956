"""What one of several processes says when it fails."""

from __future__ import annotations

import os
import time

# Processes that fail let the first one speak for so long.
SECONDS_FOR_THE_FIRST = 5.0


def who_fails() -> str:
    """What stands before the error of one of several processes: its number, nothing for the first.

    Where all of them fail alike, the first one speaks and the launcher ends the others; so those wait for a while.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    time.sleep(SECONDS_FOR_THE_FIRST)
    return f"process {rank}: "

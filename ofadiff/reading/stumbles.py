"""Code of others that stumbles over what it is given, anywhere and with any error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_one_sentence(failed: str, *known: type[Exception]) -> Iterator[None]:
    """A block in which libraries read files of others, or are called with arguments of others.

    Args:
        failed: What to say before their reason.
        known: Errors that say by themselves what is wrong.

    Raises:
        ValueError: In place of what is no error of files, values, libraries or memory already.
    """
    try:
        yield
    except (ImportError, OSError, ValueError, MemoryError, torch.OutOfMemoryError, *known):
        raise
    except Exception as error:  # constructors and pipelines raise whatever they like
        reason = " ".join(str(error).split())
        raise ValueError(f"{failed}: {type(error).__name__}{': ' if reason else ''}{reason}") from error

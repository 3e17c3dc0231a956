"""Recorded calls as what a denoiser is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofadiff.recordings.folder import Recordings
from ofadiff.recordings.joining import join
from ofadiff.recordings.recorded_call import RecordedCall


class RecordedSamples:
    """Some of the calls of recordings; a sample is one call of the denoiser, with all the rows that it had.

    Args:
        recordings: What was recorded.
        indices: Which of the recorded calls; all by default.
        joined: Whether calls that are alike are put together in one forward.
    """

    def __init__(self, recordings: Recordings, indices: Sequence[int] | None = None, joined: bool = False) -> None:
        self.recordings = recordings
        self.indices = range(len(recordings)) if indices is None else indices
        self.joined = joined

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        return {"call": self.recordings[self.indices[index]], "seeds": seed}

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `parts`, recorded calls that a denoiser is called with one after the other, and `seeds`, `(N,)`."""
        calls: list[RecordedCall] = [sample["call"] for sample in samples]
        return {
            "parts": join(calls) if self.joined else calls,
            "seeds": torch.tensor([sample["seeds"] for sample in samples]),
        }

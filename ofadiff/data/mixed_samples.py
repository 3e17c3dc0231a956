"""Recorded calls and images in the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from ofadiff.recordings.samples import RecordedSamples


class MixedSamples:
    """Recordings first, then images; in a random order each comes as often as any other.

    Args:
        recorded: Recorded calls.
        images: Images of the same pipeline, as they are trained on by themselves.
    """

    def __init__(self, recorded: RecordedSamples, images: Any) -> None:
        self.recorded = recorded
        self.images = images

    def __len__(self) -> int:
        return len(self.recorded) + len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        count = len(self.recorded)
        return self.recorded[key] if index < count else self.images[index - count, seed]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `parts` of the recorded calls, `images`, a batch of the others if there are any, and of all samples
        their `seeds` and whether they `are_images`, `(N,)`.
        """
        recorded = [sample for sample in samples if "call" in sample]
        images = [sample for sample in samples if "call" not in sample]
        batch = self.recorded.collate(recorded)
        if images:
            batch["images"] = default_collate(images)
        return {
            **batch,
            "seeds": torch.tensor([int(sample["seeds"]) for sample in samples]),
            "are_images": torch.tensor(["call" not in sample for sample in samples]),
        }

"""Images and videos of a pipeline's own calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch.utils.data import Dataset

# What an evaluation gives to every call itself, or what would change how many images come of it.
OWN = (
    "batch_size",
    "generator",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "output_type",
    "return_dict",
    "size",
)


# What says how large a sample is; samples of one report are compared, so they are of one size.
SHAPES = ("height", "width", "num_frames", "video_length")


def check_one_sample(calls: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a call asks for several images, for another shape than the first one does, or for what an
    evaluation sets itself.
    """
    for number, call in enumerate(calls, 1):
        for name in OWN:
            if name in call:
                raise ValueError(f"call {number} has the argument {name!r}; an evaluation sets it itself")
        if isinstance(call.get("prompt"), (list, tuple)):
            raise ValueError(f"call {number} has {len(call['prompt'])} prompts; a call that is evaluated has one")
        for name in SHAPES:
            if call.get(name) != calls[0].get(name):
                raise ValueError(
                    f"call {number} has {name} {call.get(name)}, call 1 {calls[0].get(name)}; calls of one report make "
                    "samples of one shape"
                )


def same_shapes(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Samples `(F, C, H, W)` as one tensor. Raises ValueError if they differ in shape, as where images came in."""
    for sample in samples:
        if sample.shape != samples[0].shape:
            raise ValueError(
                f"calls gave samples of {tuple(samples[0].shape)} and {tuple(sample.shape)} (frames, channels, height, "
                "width); calls of one report make samples of one shape"
            )
    return torch.stack([*samples])


def frames_of(output: Any, pipeline: str) -> torch.Tensor:
    """The image of a pipeline's output, `(1, C, H, W)` in [0, 1], or the frames of its video, `(F, C, H, W)`.

    Raises:
        ValueError: If it is something else, such as sound.
    """
    first = output[0]
    sample = torch.as_tensor(first[0]) if isinstance(first, list | torch.Tensor) and len(first) == 1 else None
    if sample is not None and sample.ndim in (3, 4) and sample.shape[-3] in (1, 3):
        return sample.unsqueeze(0) if sample.ndim == 3 else sample
    raise ValueError(
        f"a call of this {pipeline} gives neither one image nor one video; give recordings alone, which compare what "
        "its denoiser answers"
    )


def images_of(output: Any, pipeline: str) -> torch.Tensor:
    """The images of a pipeline's output, `(N, C, H, W)` in [0, 1].

    Raises:
        ValueError: If it has none, such as one of videos.
    """
    if not isinstance(output, BaseOutput) or "images" not in output:
        raise ValueError(
            f"this {pipeline} gives no images; sample videos with calls of the pipeline, or `ofadiff evaluate` with a "
            "--calls_file, and compare anything else on recordings (--recordings_dir)"
        )
    images = output["images"]
    if isinstance(images, np.ndarray):  # DDPMPipeline of diffusers 0.35 has no other tensors
        return torch.from_numpy(images).movedim(-1, 1)
    return images


def in_a_row(frames: torch.Tensor) -> torch.Tensor:
    """Frames `(F, C, H, W)` side by side: `(C, H, F·W)`."""
    return torch.cat(tuple(frames), dim=-1)


class Frames(Dataset[torch.Tensor]):
    """The single frames of samples that hold several side by side, each uint8 `(3, H, W)`.

    Args:
        samples: Of F frames each, `(3, H, F·W)`.
        frames: F.
    """

    def __init__(self, samples: Dataset[torch.Tensor], frames: int) -> None:
        self.samples, self.frames = samples, frames

    def __len__(self) -> int:
        return len(self.samples) * self.frames  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> torch.Tensor:
        sample, frame = divmod(index, self.frames)
        return self.samples[sample].chunk(self.frames, dim=-1)[frame]

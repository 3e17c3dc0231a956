"""Images as samples of a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from ofadiff.data.images import Images
from ofadiff.data.order import Key

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageData(Dataset[dict[str, Any]]):
    """Images as samples of a batch: `data[index, seed]` is one sample.

    A sample has `pixel_values`, `(channels, resolution, resolution)` in [-1, 1], its `seeds` entry, and `class_labels`
    if the images have labels. Images are resized and centre-cropped to a square.

    Args:
        images: Where they come from.
        resolution: Side of the square, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        random_flip: Whether half of the samples are mirrored.
        indices: Which of the images, all by default.

    Raises:
        ValueError: If there is no image mode with so many channels, or no image.
    """

    def __init__(
        self,
        images: Images,
        resolution: int,
        channels: int,
        random_flip: bool = False,
        indices: Sequence[int] | None = None,
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"images cannot have {channels} channels; accepted: {', '.join(map(str, MODES))}")
        self.images = images
        self.resolution = resolution
        self.mode = MODES[channels]
        self.random_flip = random_flip
        self.indices = range(len(images.names)) if indices is None else indices
        if not self.indices:
            raise ValueError("there are no images to train on")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, seed = self.indices[key[0]], key[1]
        image = self.images.decoded(index, self.mode)
        image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
        if self.random_flip and random.Random(seed).random() < 0.5:
            image = ImageOps.mirror(image)
        sample = {"pixel_values": pil_to_tensor(image).float() / 127.5 - 1, "seeds": seed}
        if self.images.labels is not None:
            sample["class_labels"] = self.images.labels[index]
        return sample

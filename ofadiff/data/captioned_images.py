"""Images with captions as samples of a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import crop, hflip, pil_to_tensor, resize

from ofadiff.data.captions import Captions
from ofadiff.data.images import Images
from ofadiff.data.order import Key


class TextToImageData(Dataset[dict[str, Any]]):
    """Images and captions as samples of a batch: `data[index, seed]` is one sample.

    A sample has `pixel_values`, `(3, resolution, resolution)` in [-1, 1], its `captions` entry, `time_ids`, `(6,)`
    (height and width of the original, top and left of the crop, height and width of the result, all in pixels, as SDXL
    is conditioned on), and its `seeds` entry. The shorter side is resized to the resolution, then a square is cropped.

    Args:
        images: Where the images come from.
        captions: One or several for each image; the sample's seed picks one.
        resolution: Side of the square, in pixels.
        center_crop: Whether the square is the middle one; otherwise the sample's seed picks it.
        random_flip: Whether half of the samples are mirrored.
        empty_captions: Share of the samples whose caption is empty, in [0, 1], for classifier-free guidance.
        indices: Which of the images, all by default.

    Raises:
        ValueError: If there is no image, or the share is not one.
    """

    def __init__(
        self,
        images: Images,
        captions: Captions,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        empty_captions: float = 0.0,
        indices: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= empty_captions <= 1:
            raise ValueError(f"the share of empty captions is {empty_captions}; it must lie in [0, 1]")
        self.images = images
        self.captions = captions
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.empty_captions = empty_captions
        self.indices = range(len(images.names)) if indices is None else indices
        if not self.indices:
            raise ValueError("there are no images to train on")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, seed = self.indices[key[0]], key[1]
        caption = self.draw_caption(index, seed)
        return {
            **self.view(index, self.draw_flip(seed), seed),
            "captions": "" if caption is None else self.captions[index][caption],
            "seeds": seed,
        }

    def draw_flip(self, seed: int) -> bool:
        """Whether the sample is mirrored."""
        return self.random_flip and random.Random(f"{seed} flip").random() < 0.5

    def draw_caption(self, index: int, seed: int) -> int | None:
        """Which of the image's captions the sample has; None for the empty one."""
        draw = random.Random(f"{seed} caption")
        return None if draw.random() < self.empty_captions else draw.randrange(len(self.captions[index]))

    def view(self, index: int, flip: bool, seed: int) -> dict[str, Any]:
        """The sample's `pixel_values` and `time_ids`; the seed picks the square unless it is the middle one."""
        image = self.images.decoded(index, "RGB")
        width, height = image.size
        image = resize(image, self.resolution, InterpolationMode.BILINEAR)
        if flip:
            image = hflip(image)
        top, left = self._corner(image, seed)
        image = crop(image, top, left, self.resolution, self.resolution)
        return {
            "pixel_values": pil_to_tensor(image).float() / 127.5 - 1,
            "time_ids": torch.tensor([height, width, top, left, self.resolution, self.resolution]),
        }

    def _corner(self, image: Image.Image, seed: int) -> tuple[int, int]:
        down, right = image.height - self.resolution, image.width - self.resolution
        if self.center_crop:
            return round(down / 2), round(right / 2)
        draw = random.Random(f"{seed} crop")
        return draw.randint(0, down), draw.randint(0, right)

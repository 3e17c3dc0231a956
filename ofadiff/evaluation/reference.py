"""Real images to compare with."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ofadiff.data.images import Images, check_images, image_folder
from ofadiff.evaluation.sampling import to_rgb
from ofadiff.evaluation.share import Processes

RESIZE = "centre crop, then Pillow's bicubic with antialiasing"


class Reference:
    """Real images; checked when made, loaded when asked for.

    Args:
        source: A folder, searched with its subfolders, `Images`, or uint8 images `(N, 3, H, W)` or `(N, 1, H, W)`.
        progress: Whether to show a progress bar while the images are checked.
        processes: They share the check.

    Raises:
        ValueError: If the folder holds no images or unreadable ones, or the tensor is not of that shape and dtype.
    """

    def __init__(
        self,
        source: str | Path | Images | torch.Tensor,
        progress: bool = False,
        processes: Processes | None = None,
    ) -> None:
        if isinstance(source, torch.Tensor):
            if source.dtype != torch.uint8:
                raise ValueError(f"reference images are {source.dtype}; they must be torch.uint8")
            pixels = to_rgb(source).cpu()
            names = [f"image {index}" for index in range(len(pixels))]
            self.source = Images(names, functools.partial(_to_pil, pixels))
        else:
            self.source = source if isinstance(source, Images) else image_folder(source)
            processes = Processes() if processes is None else processes
            share = processes.index, processes.count, processes.gather
            check_images(self.source, 0, progress and processes.is_main, *share)

    def __len__(self) -> int:
        return len(self.source.names)

    def images(self, height: int, width: int) -> Dataset[torch.Tensor]:
        """The images as uint8 `(3, H, W)`, brought to this size by `RESIZE`."""
        return _Resized(self.source, height, width)


def _to_pil(pixels: torch.Tensor, index: int) -> Image.Image:
    return to_pil_image(pixels[index])


class _Resized(Dataset[torch.Tensor]):
    def __init__(self, images: Images, height: int, width: int) -> None:
        self.files, self.height, self.width = images, height, width

    def __len__(self) -> int:
        return len(self.files.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.files.decoded(index, "RGB")
        return pil_to_tensor(ImageOps.fit(image, (self.width, self.height), Image.Resampling.BICUBIC))

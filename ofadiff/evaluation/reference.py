"""Real images to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from ofadiff.evaluation.sampling import to_rgb
from ofadiff.training.data import Images, check_images, image_folder


class Reference:
    """Real images, from a folder or a tensor; checked when made, loaded when asked for.

    Args:
        source: A folder, searched with its subfolders, or uint8 images `(N, 3, H, W)` or `(N, 1, H, W)`.
        progress: Whether to show a progress bar while the files are checked.

    Raises:
        ValueError: If the folder holds no images or unreadable ones, or the tensor is not of that shape and dtype.
    """

    def __init__(self, source: str | Path | torch.Tensor, progress: bool = False) -> None:
        self.source: Images | torch.Tensor
        if isinstance(source, torch.Tensor):
            if source.dtype != torch.uint8:
                raise ValueError(f"reference images are {source.dtype}; they must be torch.uint8")
            self.source = to_rgb(source).cpu()
        else:
            self.source = image_folder(source)
            check_images(self.source, progress=progress)

    def __len__(self) -> int:
        return len(self.source) if isinstance(self.source, torch.Tensor) else len(self.source.names)

    def images(self, height: int, width: int) -> torch.Tensor | Dataset[torch.Tensor]:
        """The images as uint8 `(3, H, W)`; those from files resized and centre-cropped to the size asked for."""
        return self.source if isinstance(self.source, torch.Tensor) else _Resized(self.source, height, width)


class _Resized(Dataset[torch.Tensor]):
    def __init__(self, images: Images, height: int, width: int) -> None:
        self.files, self.height, self.width = images, height, width

    def __len__(self) -> int:
        return len(self.files.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.files.load(index) as original:
            image = original.convert("RGB")
        return pil_to_tensor(ImageOps.fit(image, (self.width, self.height), Image.Resampling.BICUBIC))

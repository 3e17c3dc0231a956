"""How much of the teacher's images is left: PSNR and SSIM of images that were sampled from the same seeds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from ofadiff.evaluation.called import Frames
from ofadiff.evaluation.metrics.metric import Metric, Subject
from ofadiff.evaluation.report.rows import Column

# PSNR of two equal images is infinite, which no mean survives.
HIGHEST_PSNR = 100.0
# Wang et al.'s Gaussian window: 11 pixels wide, σ = 1.5.
SSIM_WINDOW = 11


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image `(N,)`, in dB; 100 dB for images that are equal.

    Args:
        images: uint8, `(N, 3, H, W)`.
        references: uint8, the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(images, references)
    mse = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=HIGHEST_PSNR)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image `(N,)`, at most 1.

    With the settings of Wang et al., "Image quality assessment" (2004).

    Args:
        images: uint8, `(N, 3, H, W)`, at least 11 pixels high and wide.
        references: uint8, the same shape.

    Raises:
        ImportError: If scikit-image is not installed.
        ValueError: If the shapes differ or the images are too small.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: pip install ofadiff[eval]") from error

    _check_shapes(images, references)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images are {images.shape[-2]}x{images.shape[-1]}; SSIM takes at least {SSIM_WINDOW} pixels")
    values = [
        structural_similarity(
            image.numpy(),
            reference.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for image, reference in zip(images, references, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _check_shapes(images: torch.Tensor, references: torch.Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, those to compare with {tuple(references.shape)}")


def mean_psnr(subject: Subject) -> dict[str, float | None]:
    """Mean PSNR with the teacher's images."""
    return {"psnr": _mean_over_pairs(subject, psnr)}


def mean_ssim(subject: Subject) -> dict[str, float | None]:
    """Mean SSIM with the teacher's images."""
    return {"ssim": _mean_over_pairs(subject, ssim)}


def _mean_over_pairs(subject: Subject, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float | None:
    """Mean of what compares the samples, of videos their frames, with the teacher's."""
    if subject.teacher_images is None:
        return None
    pictures = subject.pictures, Frames(subject.teacher_images, subject.frames)
    batches = [DataLoader(images, subject.batch_size) for images in pictures]
    values = [compare(ours, theirs) for ours, theirs in zip(*batches, strict=True)]
    return subject.mean_of(torch.cat([torch.empty(0), *values]))


PSNR = Metric(mean_psnr, {"psnr": Column("PSNR, dB", digits=1, better="higher")}, needs=("images", "teacher"))
SSIM = Metric(mean_ssim, {"ssim": Column("SSIM", digits=3, better="higher")}, needs=("images", "teacher"))

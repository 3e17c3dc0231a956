import numpy as np
import pytest
import torch
from evaluation.random_images import random_images
from skimage.metrics import peak_signal_noise_ratio

from ofadiff.evaluation.metrics.consistency import psnr, ssim


def test_psnr_is_that_of_each_image():
    images, references = random_images(3, seed=0), random_images(3, seed=1)
    pairs = zip(images.numpy(), references.numpy(), strict=True)
    expected = [peak_signal_noise_ratio(reference, image) for image, reference in pairs]
    assert psnr(images, references).tolist() == pytest.approx(expected, rel=1e-9)


def test_equal_images_count_as_100_db():
    images, references = random_images(2, seed=0), random_images(2, seed=1)
    mixed = torch.stack([images[0], references[1]])
    values = psnr(mixed, images).tolist()
    assert values[0] == 100 > values[1] == psnr(references[1:], images[1:]).item()


def test_ssim_falls_with_noise():
    images = random_images(2, size=24)
    noise = random_images(2, seed=1, size=24).int() - 128
    none, some, much = (ssim((images + noise * share).clamp(0, 255).to(torch.uint8), images) for share in (0, 0.1, 0.5))
    assert none.tolist() == pytest.approx([1, 1])
    assert (none > some).all() and (some > much).all() and (much > 0).all()


def test_ssim_uses_the_settings_of_the_paper():
    """One window in the middle of one channel, weighted and summed by hand."""
    image, reference = random_images(1, seed=0, size=11), random_images(1, seed=1, size=11)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    values = []
    for x, y in zip(image[0].numpy().astype(float), reference[0].numpy().astype(float), strict=True):
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        var_x, var_y = (weights * x**2).sum() - mean_x**2, (weights * y**2).sum() - mean_y**2
        covariance = (weights * x * y).sum() - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values.append(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    assert ssim(image, reference) == pytest.approx(np.mean(values), rel=1e-6)


def test_images_that_do_not_compare_are_errors():
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 16, 16\), those to compare with \(1, 3, 16, 16\)"):
        psnr(random_images(2), random_images(1))
    with pytest.raises(ValueError, match="images are 8x8; SSIM takes at least 11 pixels"):
        ssim(random_images(1, size=8), random_images(1, size=8))

"""FID and KID against independent computations."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from evaluation.random_images import random_images
from torch import nn
from torch.utils.data import Dataset

from ofadiff.evaluation import register_extractor
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.fid import frechet_distance
from ofadiff.evaluation.metrics.kid import kernel_distance


def features(count, seed, shift=0.0, scale=1.0):
    values = np.random.default_rng(seed).normal(size=(count, 6))
    return torch.from_numpy(values @ np.diag(np.linspace(0.5, 2, 6)) * scale + shift)


def test_frechet_distance_is_that_of_two_gaussians():
    ours, real = features(200, 0, shift=0.3, scale=1.4), features(300, 1)
    mean, covariance = real.numpy().mean(0), np.cov(real.numpy().T)
    other_mean, other_covariance = ours.numpy().mean(0), np.cov(ours.numpy().T)
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    assert frechet_distance(ours, real) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_grows_with_a_shift():
    real = features(300, 1)
    distances = [frechet_distance(real + shift, real) for shift in (0.0, 0.1, 0.2)]
    assert distances == pytest.approx([0, 6 * 0.1**2, 6 * 0.2**2], abs=1e-6)


def test_kernel_distance_is_the_unbiased_mmd():
    ours, real = features(40, 0, shift=1.0), features(40, 1)

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    def mmd(x, y):
        n = len(x)
        within = sum(kernel(z, z).sum() - kernel(z, z).trace() for z in (x, y)) / (n * (n - 1))
        return within - 2 * kernel(x, y).mean()

    mean, deviation = kernel_distance(ours, real)
    # The mean over subsets estimates what all samples give: within a standard error of 100 subsets.
    assert abs(mean - mmd(ours, real).item()) < 4 * deviation / 10
    assert mean > 0.5 and deviation > 0


def test_kernel_distance_of_one_distribution_is_zero_up_to_its_spread():
    mean, deviation = kernel_distance(features(400, 0), features(300, 1))
    assert abs(mean) < deviation


def test_too_few_samples_are_errors():
    with pytest.raises(ValueError, match="there are 1 samples; a covariance takes at least 2"):
        frechet_distance(features(1, 0), features(9, 1))
    with pytest.raises(ValueError, match="the smaller set has 3 samples"):
        kernel_distance(features(9, 0), features(3, 1))


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_the_numbers_are_those_of_torch_fidelity():
    ours, real = random_images(60, seed=0), random_images(80, seed=1) // 2
    extractor = FeatureExtractor("tiny")
    found = [extractor.features(images, batch_size=32) for images in (ours, real)]
    expected = torch_fidelity.calculate_metrics(
        input1=Images(ours),
        input2=Images(real),
        feature_extractor="tiny",
        fid=True,
        kid=True,
        kid_subset_size=30,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert frechet_distance(*found) == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert kernel_distance(*found) == pytest.approx(
        (expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]), rel=1e-4
    )


def test_an_extractor_is_a_frozen_copy_and_can_be_replaced():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).train()
    floats = nn.Sequential(ToFloat(), module)
    register_extractor("own", floats)
    images = random_images(4)
    before = FeatureExtractor("own").features(images)
    assert before.shape == (4, 5) and not before.requires_grad
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        module[1].weight.mul_(2)
    assert torch.equal(FeatureExtractor("own").features(images), before)
    register_extractor("own", floats)
    assert not torch.equal(FeatureExtractor("own").features(images), before)


class ToFloat(nn.Module):
    def forward(self, images):
        return images.float()


def test_bad_extractors_are_errors():
    with pytest.raises(ValueError, match="extractor is 'nothing'; it must be one of inception, "):
        FeatureExtractor("nothing")
    with pytest.raises(ValueError, match="'inception' is one of torch-fidelity's own"):
        register_extractor("inception", nn.Identity())
    register_extractor("images", ToFloat())
    with pytest.raises(ValueError, match=r"maps \(4, 3, 16, 16\) to \(4, 3, 16, 16\); it must give \(4, D\)"):
        FeatureExtractor("images").features(random_images(4))

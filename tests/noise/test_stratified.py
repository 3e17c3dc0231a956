"""Noise levels of a step that are spread over all of them."""

import functools

import pytest
import torch
from diffusers import DDPMScheduler

from ofadiff.noise.diffusion import diffuse
from ofadiff.noise.draws import draw_noise, stratified_quantiles
from ofadiff.noise.flow_matching import interpolate


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_equal_part_has_one_quantile(count):
    for step in range(20):
        quantiles = stratified_quantiles(count, step, seed=3)
        assert quantiles.min() >= 0 and quantiles.max() < 1
        assert sorted((quantiles * count).long().tolist()) == list(range(count))
        assert torch.equal(quantiles, stratified_quantiles(count, step, seed=3))
    assert not torch.equal(quantiles, stratified_quantiles(count, step + 1, seed=3))
    assert not torch.equal(quantiles, stratified_quantiles(count, step, seed=4))


@pytest.mark.parametrize("count", [1, 4])
def test_the_quantile_of_one_sample_is_uniform_over_the_steps(count):
    every = torch.stack([stratified_quantiles(count, step, seed=0) for step in range(4000)])
    for own in every.T:
        shares = torch.histc(own, bins=10, min=0, max=1) / len(own)
        assert (shares - 0.1).abs().max() < 4 * (0.09 / len(own)) ** 0.5


def forward_processes():
    scheduler = DDPMScheduler(num_train_timesteps=100)
    return [functools.partial(diffuse, noise_scheduler=scheduler), functools.partial(interpolate, shift=3.0)]


@pytest.mark.parametrize("forward_process", forward_processes(), ids=["diffusion", "flow matching"])
def test_a_step_meets_the_same_levels_far_more_evenly(forward_process):
    def means(quantiles):
        steps = range(200)
        seeds = [torch.arange(16) + 1000 * step for step in steps]
        x0 = torch.zeros(16, 1, 2, 2)
        times = [forward_process(x0, seeds[step], quantiles=quantiles(step)).timesteps.float() for step in steps]
        return torch.stack(times)

    drawn, spread = means(lambda step: None), means(lambda step: stratified_quantiles(16, step, seed=0))
    assert spread.mean(1).std() < 0.2 * drawn.mean(1).std()
    # Over all steps it is the same distribution.
    levels = torch.linspace(0.05, 0.95, 10)
    assert (spread.quantile(levels) - drawn.quantile(levels)).abs().max() < 0.05 * spread.max()


@pytest.mark.parametrize("forward_process", forward_processes(), ids=["diffusion", "flow matching"])
def test_the_noise_is_that_of_the_seeds(forward_process):
    x0, seeds = torch.rand(4, 1, 4, 4), torch.arange(4)
    plain = forward_process(x0, seeds)
    spread = forward_process(x0, seeds, quantiles=torch.tensor([0.1, 0.9, 0.4, 0.6]))
    # DDPM's target is the noise, that of flow matching the noise less the image.
    assert torch.equal(plain.target, spread.target) and not torch.equal(plain.sample, spread.sample)
    order = spread.timesteps.argsort()
    assert order.tolist() == [0, 2, 3, 1]


def test_the_largest_quantile_is_a_timestep_still():
    quantiles = torch.tensor([0.0, 1 - 2**-24])
    for steps in (3, 1000, 10**6):
        assert draw_noise(torch.arange(2), (1, 1, 1), steps, quantiles)[1].tolist() == [0, steps - 1]
    noisy = interpolate(torch.ones(2, 1, 1, 1), torch.arange(2), quantiles=quantiles)
    assert noisy.timesteps[0] == 0 and 990 < noisy.timesteps[1] <= 1000 and noisy.sample.isfinite().all()

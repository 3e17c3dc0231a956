import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from ofadiff.noise.flow_matching import interpolate, is_flow_matching, shift_sigmas, static_shift


def test_the_target_leads_from_the_sample_to_the_image_and_to_the_noise():
    x0 = torch.rand(6, 4, 8, 8) * 2 - 1
    noisy = interpolate(x0, torch.arange(6), shift=3.0)
    sigmas = (noisy.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.sample - sigmas * noisy.target, x0)
    noise = noisy.sample + (1 - sigmas) * noisy.target
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert torch.equal(noisy.weight, torch.ones(6))


def test_samples_are_those_that_the_scheduler_of_the_pipeline_denoises():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0 = torch.rand(1, 4, 8, 8)
    noise, t = torch.randn(1, 4, 8, 8), scheduler.timesteps[300:301]
    x_t = scheduler.scale_noise(x0, t, noise)
    # One step of the scheduler along ε − x0 arrives where its next level of noise is.
    scheduler.set_begin_index(300)
    stepped = scheduler.step(noise - x0, t, x_t).prev_sample
    torch.testing.assert_close(stepped, scheduler.scale_noise(x0, scheduler.timesteps[301:302], noise))
    sigma = t / 1000
    torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_levels_of_noise_are_shifted_as_in_the_pipeline(scheduler):
    assert is_flow_matching(type(scheduler).__name__, scheduler.config)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas[:-1]
    unshifted = sigmas / (sigmas + static_shift(scheduler.config) * (1 - sigmas))
    torch.testing.assert_close(unshifted.diff(), unshifted.diff()[:1].expand(9), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shift_sigmas(unshifted, static_shift(scheduler.config)), sigmas)
    torch.testing.assert_close(sigmas * 1000, scheduler.timesteps.to(sigmas), atol=1.0, rtol=0)


def test_a_scheduler_that_shifts_by_resolution_trains_unshifted():
    assert static_shift(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).config) == 1.0


def test_levels_of_noise_are_logit_normal():
    noisy = interpolate(torch.zeros(4000, 1, 1, 1), torch.arange(4000))
    logits = (noisy.timesteps / 1000).logit()
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05


def test_a_sample_meets_the_same_noise_in_every_batch():
    x0 = torch.rand(3, 1, 4, 4)
    together = interpolate(x0, torch.arange(3))
    for n in range(3):
        alone = interpolate(x0[n : n + 1], torch.tensor([n]))
        assert torch.equal(alone.sample[0], together.sample[n]) and alone.timesteps[0] == together.timesteps[n]
    assert len(together.timesteps.unique()) == 3

import functools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ofadiff.denoisers.prepare import DenoiserInputs, prepare_batch, prepare_pixels
from ofadiff.denoisers.unet_2d_condition import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from ofadiff.noise.diffusion import diffuse, min_snr_weight
from ofadiff.noise.draws import draw_noise, draw_normal
from ofadiff.training.losses import denoising_loss, predict


def make_batch(n=4):
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"pixel_values": images, "seeds": torch.arange(n) + 7, "class_labels": torch.arange(n) % 3}


def recover_x0(prediction_type, x_t, output, alpha, sigma):
    """x0 from what a perfect denoiser says, by the definitions of the prediction types."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    return output


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_a_perfect_denoiser_says(prediction_type, scheduler_class):
    scheduler = scheduler_class(num_train_timesteps=100, prediction_type=prediction_type)
    batch = make_batch()
    inputs = prepare_pixels(batch, scheduler)
    alpha = scheduler.alphas_cumprod[inputs.arguments["timestep"]].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    x0 = recover_x0(prediction_type, inputs.arguments["sample"], inputs.target, alpha, sigma)
    torch.testing.assert_close(x0, batch["pixel_values"], atol=1e-4, rtol=0)
    assert inputs.arguments["class_labels"] is batch["class_labels"]


def test_a_sample_meets_the_same_noise_in_every_batch():
    seeds = torch.arange(6)
    noise, timesteps = draw_noise(seeds, (1, 8, 8), 100)
    for n in range(6):
        alone, timestep = draw_noise(seeds[n : n + 1], (1, 8, 8), 100)
        assert torch.equal(alone[0], noise[n]) and timestep[0] == timesteps[n]
    assert len(noise.flatten(1).unique(dim=0)) == 6


def test_noise_is_gaussian_and_timesteps_are_uniform():
    noise, timesteps = draw_noise(torch.arange(4000), (1, 4, 4), 10)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10 and (counts - 400).abs().max() < 4 * 400**0.5


def test_the_loss_of_a_sample_does_not_depend_on_the_others(teacher, noise_scheduler):
    def prepare(batch):
        return prepare_pixels(batch, noise_scheduler)

    batch = make_batch()
    losses = denoising_loss(teacher, batch, prepare)
    assert losses.shape == (4,)
    for n in range(4):
        alone = denoising_loss(teacher, {key: value[n : n + 1] for key, value in batch.items()}, prepare)
        torch.testing.assert_close(alone[0], losses[n])


def test_a_denoiser_in_half_precision_is_told_the_exact_timesteps(teacher):
    told = []
    handle = teacher.bfloat16().register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True)
    arguments = {"sample": torch.zeros(1, 1, 8, 8), "timestep": torch.tensor([998.7])}
    predict(teacher, DenoiserInputs({**arguments, "class_labels": torch.tensor([0])}, torch.zeros(1), torch.ones(1)))
    handle.remove()
    assert told[0]["sample"].dtype == torch.bfloat16 and told[0]["timestep"] == 998.7


def test_another_prediction_type_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="'flow_prediction'; accepted: epsilon, v_prediction, sample"):
        prepare_pixels(make_batch(), scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_all_prediction_types_alike_in_terms_of_x0(prediction_type):
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    timesteps = torch.tensor([0, 30, 60, 99])
    alpha = scheduler.alphas_cumprod[timesteps].sqrt()
    sigma = (1 - alpha**2).sqrt()
    # A prediction that is off by e means an x0 that is off by e times this, by the definitions of the prediction types.
    x0_error = {"epsilon": sigma / alpha, "v_prediction": sigma, "sample": torch.ones(4)}[prediction_type]
    expected = ((alpha / sigma) ** 2).clamp(max=5.0)
    torch.testing.assert_close(min_snr_weight(scheduler, timesteps, 5.0) / x0_error**2, expected)


def test_the_weights_reach_the_loss():
    scheduler = DDPMScheduler(num_train_timesteps=100)
    x0, seeds = torch.zeros(6, 4, 8, 8), torch.arange(6)
    noisy = diffuse(x0, seeds, scheduler, snr_gamma=5.0)
    assert torch.equal(noisy.weight, min_snr_weight(scheduler, noisy.timesteps, 5.0))
    assert torch.equal(diffuse(x0, seeds, scheduler).weight, torch.ones(6))


def test_the_noise_offset_shifts_whole_channels_of_input_and_target():
    scheduler = DDPMScheduler(num_train_timesteps=100)
    x0, seeds = torch.zeros(6, 4, 8, 8), torch.arange(6)
    plain, shifted = (diffuse(x0, seeds, scheduler, noise_offset=offset) for offset in (0.0, 0.5))
    shift = shifted.target - plain.target
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-5, rtol=0)
    assert 0.3 < shift[:, :, 0, 0].std() < 0.7
    sigma = (1 - scheduler.alphas_cumprod[plain.timesteps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(shifted.sample, plain.sample + sigma * shift, atol=1e-5, rtol=0)


def test_draws_of_different_purposes_are_independent():
    first, second = (draw_normal(torch.arange(500), (4,), purpose) for purpose in ("latent", "noise offset"))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.1
    assert torch.equal(first[7:9], draw_normal(torch.tensor([7, 8]), (4,), "latent"))


def test_latents_are_drawn_from_their_distribution_anew_for_every_seed():
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type="sample")
    n = 400
    batch = {
        "latent_mean": torch.full((n, 4, 2, 2), 3.0),
        "latent_std": torch.full((n, 4, 2, 2), 0.5),
        "encoder_hidden_states": torch.zeros(n, 5, 8),
        "seeds": torch.arange(n),
    }
    forward_process = functools.partial(diffuse, noise_scheduler=scheduler)
    inputs = prepare_batch(batch, STABLE_DIFFUSION, {}, forward_process)
    assert inputs.target.mean() == pytest.approx(3.0, abs=0.05) and inputs.target.std() == pytest.approx(0.5, abs=0.05)
    assert set(inputs.arguments) == {"sample", "timestep", "encoder_hidden_states"}
    added = {"text_embeds": torch.zeros(n, 8), "time_ids": torch.ones(n, 6).long()}
    xl = prepare_batch({**batch, **added}, STABLE_DIFFUSION_XL, {}, forward_process)
    assert set(xl.arguments["added_cond_kwargs"]) == {"text_embeds", "time_ids"}

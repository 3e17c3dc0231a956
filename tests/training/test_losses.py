import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ofadiff.training.losses import denoising_loss, draw_noise, prepare_pixels


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


def test_another_prediction_type_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="'flow_prediction'; accepted: epsilon, v_prediction, sample"):
        prepare_pixels(make_batch(), scheduler)

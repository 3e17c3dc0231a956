"""Numbers that mean nothing stop a run; a resumed run is the same run, or says what differs."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ofadiff import score_channels
from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.noise.diffusion import diffuse, min_snr_weight
from ofadiff.reweight import sample_size
from ofadiff.training.checkpoint import check_flags, find_checkpoint, load_checkpoint, save_checkpoint
from ofadiff.training.validation import validation_losses
from training.test_checkpoint import make_state
from training.tiny_run import make_data, make_supernet


@pytest.mark.parametrize("gamma", [0, -5, math.nan, math.inf])
def test_a_gamma_without_meaning_is_refused(gamma):
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match=r"snr_gamma is .*; it must be positive and finite"):
        min_snr_weight(scheduler, torch.tensor([0, 500]), gamma)
    with pytest.raises(ValueError, match=r"snr_gamma is .*; it must be positive and finite"):
        diffuse(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), scheduler, snr_gamma=gamma)


def test_options_that_a_strategy_or_a_criterion_does_not_take_are_refused():
    supernet = make_supernet()
    assert {sample_size((0.5, 1.0), step, 0, m=1e9) for step in range(20)} == {0.5}
    for m in (0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"m is .*; it must be positive and finite"):
            sample_size((0.5, 1.0), 0, 0, m=m)
    with pytest.raises(ValueError, match="strategy 'uniform' takes no option 'm'; it takes none"):
        sample_size((0.5, 1.0), 0, 0, "uniform", m=2)
    with pytest.raises(ValueError, match="criterion 'random' takes no option 'loss_threshold'; it takes seed"):
        score_channels(supernet.model, supernet.groups, criterion="random", loss_threshold=0.5)


@pytest.mark.parametrize(
    ("name", "made", "given", "message"),
    [
        ("AdamW", {"lr": 1e-2}, {"lr": 1e-3}, "its learning rate is 0.01, this run's is 0.001"),
        ("AdamW", {"weight_decay": 0.1}, {"weight_decay": 0.0}, "its weight decay is 0.1, this run's is 0.0"),
        (
            "AdamW",
            {"betas": (0.9, 0.99)},
            {"betas": (0.8, 0.99)},
            "its betas is .0.9, 0.99., this run's is .0.8, 0.99.",
        ),
        ("SGD", {"momentum": 0.9}, {"momentum": 0.5}, "its momentum is 0.9, this run's is 0.5"),
    ],
)
def test_another_optimizer_is_not_replaced_silently(tmp_path, name, made, given, message):
    def optimizer(**options):
        return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 1e-2, **options})

    checkpoint = save_checkpoint(make_state(make_supernet(), 2, optimizer(**made), seed=1), tmp_path)
    load_checkpoint(make_state(make_supernet(), 0, optimizer(**made), seed=1), checkpoint)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(make_state(make_supernet(), 0, optimizer(**given), seed=1), checkpoint)


def test_flags_of_a_run_are_kept_and_compared(tmp_path):
    state = make_state(make_supernet(), 1)
    state.flags = {"snr_gamma": None, "sizes": [0.5, 1.0], "logging_dir": "a"}
    checkpoint = save_checkpoint(state, tmp_path)
    check_flags(checkpoint, {**state.flags, "logging_dir": "b", "new": 1}, ["logging_dir"])
    for name, value in (("snr_gamma", 5.0), ("sizes", [0.6, 1.0])):
        with pytest.raises(ValueError, match=rf"its --{name} is .*, not .*only these may change: logging_dir"):
            check_flags(checkpoint, {**state.flags, name: value}, ["logging_dir"])
    # A checkpoint that has kept none says nothing of them.
    state.flags = {}
    check_flags(save_checkpoint(state, tmp_path / "old"), {"snr_gamma": 5.0}, [])


def test_a_checkpoint_is_found_by_its_name_in_the_output_folder(tmp_path):
    checkpoint = save_checkpoint(make_state(make_supernet(), 2), tmp_path)
    for name in ("checkpoint-2", str(checkpoint), "latest"):
        assert find_checkpoint(tmp_path, name) == checkpoint
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a checkpoint to resume from; .* there is checkpoint-2$"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_validation_prepares_each_batch_once_for_all_sizes(make_accelerator):
    supernet, (data, _) = make_supernet(), make_data()
    batches = [[data[index, seed] for index in range(3)] for seed in range(4)]
    stacked = [
        {name: torch.stack([torch.as_tensor(sample[name]) for sample in batch]) for name in batch[0]}
        for batch in batches
    ]
    prepared = []

    def prepare(batch):
        prepared.append(batch)
        return prepare_pixels(batch, DDPMScheduler(num_train_timesteps=100))

    losses = validation_losses(supernet, iter(stacked), prepare, make_accelerator())  # once through is enough
    assert len(prepared) == len(stacked) and losses.keys() == set(supernet.sizes)
    for size in supernet.sizes:
        small = supernet.extract(size)
        inputs = [prepare_pixels(batch, DDPMScheduler(num_train_timesteps=100)) for batch in stacked]
        expected = [(small(**each.arguments).sample - each.target).square().mean().item() for each in inputs]
        assert losses[size] == pytest.approx(sum(expected) / len(expected), rel=1e-5)

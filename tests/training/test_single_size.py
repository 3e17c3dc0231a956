import functools

import pytest
import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig, inject_adapter_in_model

from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.training.single_size import SingleSize, trained_weights
from training.tiny_run import make_supernet, make_teacher, train_with

pytestmark = pytest.mark.slow


def make_single_size(rank=2, **description):
    """Half of the tiny supernet with a LoRA, or without a rank the whole subnet."""
    supernet = make_supernet()
    model = supernet.extract(0.5)
    if rank:
        torch.manual_seed(0)
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=["conv1", "conv2", "to_q", "to_out.0"]), model)
    return SingleSize(model, supernet.subnets.only(0.5), supernet.groups, {"size": 0.5, "rank": rank, **description})


@pytest.fixture
def run(data, noise_scheduler, make_accelerator, tmp_path):
    def run(single, steps=6, **options):
        settings = {"max_train_steps": steps, "train_batch_size": 4, "validation_samples": 16, "seed": 5}
        settings |= {"teacher": make_teacher(), "feature_distill_weight": 0.1, "output_dir": tmp_path}
        optimizer = torch.optim.AdamW(trained_weights(single.model).values(), lr=1e-2)
        lr_scheduler = get_scheduler("constant", optimizer)
        prepare = functools.partial(prepare_pixels, noise_scheduler=noise_scheduler)
        settings |= options
        return train_with(single, data, prepare, optimizer, lr_scheduler, make_accelerator(), **settings)

    return run


@pytest.mark.parametrize("rank", [2, 0])
def test_one_size_learns_and_what_is_frozen_stays(run, rank):
    single = make_single_size(rank)
    before = {name: weight.clone() for name, weight in single.model.named_parameters()}
    history = run(single, steps=12).history
    assert history[12][0.5] < 0.95 * history[0][0.5]
    changed = {name for name, weight in single.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if rank == 0 or "lora_" in name}


@pytest.mark.parametrize("rank", [2, 0])
def test_a_resumed_run_ends_as_one_that_was_not_killed(run, tmp_path, rank):
    whole, resumed = make_single_size(rank), make_single_size(rank)
    run(whole, output_dir=tmp_path / "whole")
    run(make_single_size(rank), steps=4, checkpointing_steps=4)
    run(resumed, resume_from=tmp_path / "checkpoint-4")
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-4: its alpha is None, this run's is 8"):
        run(make_single_size(rank, alpha=8), resume_from=tmp_path / "checkpoint-4")


def test_it_has_no_other_size():
    with pytest.raises(ValueError, match=r"size is 1\.0; it must be one of 0\.5"):
        make_single_size().set_size(1.0)

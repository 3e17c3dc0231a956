"""The examples of the public functions run as they stand in their docstrings."""

import doctest

import pytest
import torch
from conftest import plain_unet, random_inputs, squared_output_loss
from diffusers import DDPMPipeline, DDPMScheduler

import ofadiff
from ofadiff import Supernet, allocate, find_channel_groups, score_channels


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples find: a pipeline of a tiny `unet`, a batch, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    unet = plain_unet().eval()
    pipeline = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained("original")
    batches, loss_fn = [random_inputs(unet)], squared_output_loss
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="magnitude")
    subnets = allocate(unet, groups, scores, sizes=(0.5, 1.0))
    made = plain_unet().eval()
    made.load_state_dict(unet.state_dict())
    DDPMPipeline(made, pipeline.scheduler).save_pretrained("ofa")
    Supernet(made, find_channel_groups(made), scores, subnets).save_pretrained("ofa/unet")
    pipeline.set_progress_bar_config(disable=True)
    found = {"unet": unet, "groups": groups, "scores": scores, "subnets": subnets, "pipeline": pipeline}
    return {**vars(ofadiff), **found, "batches": batches, "loss_fn": loss_fn}


@pytest.mark.parametrize("name", ofadiff.__all__)
def test_the_example_runs(name, names):
    public = getattr(ofadiff, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=names)
    assert example.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).failed == 0

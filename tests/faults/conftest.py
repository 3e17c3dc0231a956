"""What the tests of faults share: tiny originals, their data, and the process that others are forked from."""

import json

import pytest
import torch
from conftest import plain_unet
from diffusers import DDPMPipeline, DDPMScheduler
from faults.harness import Nursery, finish
from faults.launches import pixels
from recipes.tiny_stable_diffusion import save_captioned_images, save_stable_diffusion
from training.tiny_shards import save_shards


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A pixel model and a text-to-image model, images, shards and calls."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    unet = plain_unet(sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "ddpm")
    save_stable_diffusion(folder / "sd")
    save_captioned_images(folder / "images")
    (folder / "images" / "metadata.jsonl").unlink()
    save_shards(folder / "shards", counts=(9, 7, 8))
    calls = [json.dumps({"batch_size": 1, "num_inference_steps": 3}) for _ in range(6)]
    (folder / "calls.jsonl").write_text("\n".join(calls))
    return folder


@pytest.fixture(scope="session")
def whole(nursery, originals, tmp_path_factory):
    """The output folder of a run in float32 that was never killed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    finish(nursery, pixels(originals), folder)
    return folder

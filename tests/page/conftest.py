"""Tiny checkpoints to play with, and the page of one of them."""

import pytest
from evaluation.conftest import checkpoint  # noqa: F401
from tiny_pipelines import load, make_checkpoint

from ofadiff import SizeSchedule
from ofadiff.page.playground import Playground


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory):
    """A Stable Diffusion of sizes 0.6 and 1.0, with a schedule of them."""
    folder = tmp_path_factory.mktemp("sd") / "checkpoint"
    pipeline = load(make_checkpoint(folder))
    pipeline.set_schedule("fast", SizeSchedule([1.0, 0.6, 0.6, 0.6]))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def playground(text_to_image):
    return Playground(load(text_to_image))

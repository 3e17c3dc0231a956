"""Pictures on the page are those of the pipeline."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from recipes.test_compress_dit import make_transformer
from tiny_pipelines import load
from tiny_stable_diffusion import make_scheduler, make_vae

from ofadiff import OFAPipeline
from ofadiff.evaluation.checkpoints import open_pipeline
from ofadiff.page.captions import caption, step_plot
from ofadiff.page.form import Request
from ofadiff.page.playground import Playground
from ofadiff.profiling.cost import count_macs, count_parameters

ON = torch.float32, torch.device("cpu")
LETTERS = Request(seed=5, prompt="a c", steps=4, guidance=2.0)


def same(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other))


def picture_of(pipeline, **arguments):
    """What a pipeline's own user gets."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(5), **arguments).images[0]


def test_a_picture_is_the_one_that_the_pipeline_gives(playground, text_to_image):
    pipeline = load(text_to_image)
    pictures = {choice: playground.draw(LETTERS, choice) for choice in playground.choices}
    assert [picture.title for picture in pictures.values()] == ["size 0.6", "size 1.0", "schedule fast"]
    for choice, size in {"0.6": 0.6, "1.0": 1.0, "schedule fast": "fast"}.items():
        arguments = {"prompt": "a c", "num_inference_steps": 4, "guidance_scale": 2.0}
        assert same(pictures[choice].image, picture_of(pipeline, size=size, **arguments))
    assert not any(same(one.image, other.image) for one, other in pairwise(pictures.values()))
    assert playground.pipeline.size == 1.0
    assert not vars(playground.pipeline).get("_progress_bar_config")  # as before


def unconditional(folder):
    unet = plain_unet()
    make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
    return {}


def classes_of_latents(folder):
    transformer = make_transformer(out_channels=8, num_embeds_ada_norm=10)
    make_supernet(transformer, sizes=(0.7, 1.0))
    names = {number: f"class {number}" for number in range(10)}
    DiTPipeline(transformer, make_vae(), make_scheduler(), names).save_pretrained(folder)
    return {"class_labels": [2], "guidance_scale": 1.0}  # diffusers guides with a class 1000


@pytest.mark.parametrize("save", [unconditional, classes_of_latents])
def test_other_kinds_of_pipelines(save, tmp_path):
    torch.manual_seed(0)
    arguments = save(tmp_path / "ofa")
    playground = Playground(open_pipeline(tmp_path / "ofa", *ON))
    pipeline = OFAPipeline.from_pretrained(tmp_path / "ofa")
    request = playground.form.request("", 2, 5, 3, 1.0)
    smallest, largest = (str(size) for size in pipeline.sizes)
    expected = picture_of(pipeline, size="smallest", num_inference_steps=3, **arguments)
    assert same(playground.draw(request, smallest).image, expected)
    assert playground.original_title == "the largest size, 1.0"
    assert same(playground.draw_original(request).image, playground.draw(request, largest).image)


def test_the_original_is_drawn_beside_the_sizes(checkpoint):
    folders = checkpoint / "ofa", checkpoint / "teacher"
    playground = Playground(*(open_pipeline(folder, *ON) for folder in folders))
    request = playground.form.request(None, 7, 5, 2, None)
    original = playground.draw_original(request)
    teacher = open_pipeline(checkpoint / "teacher", *ON)
    assert same(original.image, picture_of(teacher, class_labels=[7], num_inference_steps=2))
    assert original.title == "the original" and (original.costs.params_share, original.costs.macs_share) == (1, 1)
    assert original.costs.params == count_parameters(teacher.unet)
    assert original.costs.weight_bytes == 4 * original.costs.params


def test_an_original_that_is_called_otherwise_is_refused(playground, checkpoint):
    with pytest.raises(ValueError, match=r"the original is a Class.*; it must be called as the checkpoint's StableD"):
        Playground(playground.pipeline, open_pipeline(checkpoint / "teacher", *ON))


def test_costs_are_those_of_what_is_drawn(playground):
    small, large, mixed = (playground.draw(LETTERS, choice).costs for choice in playground.choices)
    unet = playground.pipeline.extract(0.6).unet
    full = playground.pipeline.extract(1.0).unet
    assert small.params == count_parameters(unet) and large.params == count_parameters(full)
    assert small.params_share == pytest.approx(count_parameters(unet) / count_parameters(full))
    assert small.macs_share == pytest.approx(count_macs(unet) / count_macs(full)) and large.macs_share == 1
    assert mixed.macs_share == pytest.approx((1 + 3 * small.macs_share) / 4)
    assert mixed.params == large.params  # in one of its steps it needs them all


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_costs_of_a_schedule_are_those_of_the_forwards_made(text_to_image, scheduler):
    pipeline = load(text_to_image)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    table, made = pipeline.subnets, []
    pipeline.unet.conv_in.register_forward_hook(lambda *call: made.append(table.find(pipeline.size).macs))
    costs = Playground(pipeline).draw(LETTERS, "schedule fast").costs
    assert len(made) == 7 and costs.macs_share == pytest.approx(np.mean(made) / table.full_macs)


def test_users_at_once_do_not_mix_sizes(playground):
    requests = [(Request(seed=seed, prompt="a", steps=2), size) for seed in range(3) for size in ("0.6", "1.0")]
    alone = [playground.draw(*request).image for request in requests]
    with ThreadPoolExecutor(len(requests)) as users:
        together = [picture.image for picture in users.map(lambda request: playground.draw(*request), requests)]
    assert all(map(same, alone, together))


def test_a_size_that_is_not_there_is_an_error(playground):
    with pytest.raises(ValueError, match=r"the size is '0.7'; it must be one of 0.6, 1.0, schedule fast"):
        playground.draw(LETTERS, "0.7")


def test_a_caption_says_what_a_picture_took(playground):
    words = caption(playground.draw(LETTERS, "0.6"), playground.pipeline.sizes)
    assert "<th>time</th>" in words and " s</td>" in words and "<svg" not in words
    assert re.search(r" M \((59\.[5-9]|60\.[0-5])%\)", words)
    assert "peak memory" not in words  # on the CPU nobody knows it
    mixed = playground.draw(LETTERS, "schedule fast")
    words = caption(mixed, playground.pipeline.sizes)
    assert "over the steps" in words and step_plot([1.0, 0.6, 0.6, 0.6], (0.6, 1.0)) in words


def test_the_plot_has_a_step_where_the_size_changes():
    plot = step_plot([1.0, 1.0, 0.4, 0.6], (0.4, 0.6, 1.0))
    points = plot.split('points="')[1].split('"')[0].split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs == (34, 124, 124, 214, 214, 304, 304, 394)
    assert ys[0] == ys[3] == 8 and ys[4] == ys[5] == 88 and ys[6] == pytest.approx(88 - 80 / 3, abs=0.1)
    assert "step 4</text>" in plot and ">0.6</text>" in plot

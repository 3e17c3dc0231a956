"""What a page asks for, of pipelines of every kind."""

import diffusers
import pytest
import torch
from recipes.test_compress_dit import make_transformer
from tiny_pipelines import load
from tiny_stable_diffusion import make_scheduler, make_vae
from versions import since

from ofadiff import OFAPipeline
from ofadiff.page.form import Form, Request


def without_weights(name):
    """A pipeline of a class with nothing in it: its call is all that is looked at."""
    made = since(f"diffusers.{name}")
    return made.__new__(made)


@pytest.mark.parametrize(
    ("name", "prompt", "guidance"),
    [
        ("DDPMPipeline", False, None),
        ("StableDiffusionXLPipeline", True, 5.0),
        ("FluxPipeline", True, 3.5),
        ("Flux2Pipeline", True, 4.0),  # takes images, and does without
        ("SanaPipeline", True, 4.5),
        ("PixArtSigmaPipeline", True, 4.5),
    ],
)
def test_what_a_call_takes_is_asked_for(name, prompt, guidance):
    form = Form.of(without_weights(name))
    assert (form.prompt, form.guidance, form.guided) == (prompt, guidance, guidance is not None)
    assert not form.classes and 1 <= form.steps <= 50


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionImg2ImgPipeline", "takes image, which the page does not ask for"),
        ("StableDiffusionControlNetPipeline", "takes image, which"),
        ("MarigoldDepthPipeline", "takes image, which"),
        ("KandinskyV22Pipeline", "takes image_embeds and negative_image_embeds, which"),
        ("WanPipeline", "a WanPipeline gives videos, and the page shows pictures alone"),
        ("StableAudioPipeline", "a StableAudioPipeline gives sound"),
    ],
)
def test_a_call_that_a_page_cannot_make_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Form.of(without_weights(name))


def test_classes_go_by_number_and_name():
    names = {0: "crane, a bird", 1: "crane", 2: "boat"}
    transformer = make_transformer(out_channels=8)
    form = Form.of(diffusers.DiTPipeline(transformer, make_vae(), make_scheduler(), names))
    assert form.classes == {0: "0 a bird", 1: "1 crane", 2: "2 boat"}  # a name of two classes is the last one's
    assert form.guidance == 4.0 and not form.prompt
    assert form.request(None, 1, 3, 2.0, None) == Request(seed=3, label=1, steps=2)
    with pytest.raises(ValueError, match="the class is 3; choose one of the list"):
        form.request(None, 3, 0, 2, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"seed": -1}, "the seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "the seed is 4294967296; it must"),
        ({"seed": "x"}, "the seed is 'x'; it must"),
        ({"seed": None}, "the seed is empty; it must"),
        ({"steps": 0}, "the number of steps is 0; it must be a whole number from 1 to 1000"),
        ({"steps": 1.5}, "the number of steps is 1.5; it must"),
        ({"steps": "many"}, "the number of steps is 'many'; it must"),
        ({"steps": True}, "the number of steps is True; it must"),
        ({"steps": float("nan")}, "the number of steps is nan; it must"),
        ({"guidance": "strong"}, "the guidance scale is 'strong'; it must be a number"),
        ({"guidance": float("inf")}, "the guidance scale is inf; it must be a number"),
    ],
)
def test_a_wrong_field_is_one_sentence(playground, changed, message):
    fields = {"prompt": "a", "label": None, "seed": 0, "steps": 2, "guidance": None}
    with pytest.raises(ValueError, match=message):
        playground.form.request(**{**fields, **changed})
    assert playground.form.request(**fields) == Request(seed=0, prompt="a", steps=2)


def test_pipelines_of_other_tasks_are_refused_with_their_sizes(text_to_image):
    image_to_image = OFAPipeline.from_pipe(load(text_to_image), diffusers.StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match="the call of a StableDiffusionImg2ImgPipeline takes image, which"):
        Form.of(image_to_image)


def test_the_noise_is_that_of_the_seed():
    first, again = (Request(seed=3).arguments()["generator"] for _ in range(2))
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=again))
    assert first.device.type == "cpu"

"""A small size for the unconditional half of guidance, and as the bad model of autoguidance."""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_supernet, make_unet
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from test_tasks import make_controlnet
from tiny_pipelines import PICTURE, image, load, make_checkpoint

from ofadiff import OFAPipeline, SizeSchedule, Supernet
from ofadiff.pipelines.guidance_table import HALVES, Halves

SMALL, LARGE = 0.6, 1.0
STEPS, SCALE = 3, 4.0

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sd") / "checkpoint")


@pytest.fixture
def pipeline(folder):
    return load(folder)


def forwards(pipeline, **arguments):
    """Size and rows of each forward of a call."""
    seen = []
    supernet = pipeline.supernet
    hook = lambda module, args, kwargs: seen.append((supernet.size, len(args[0])))  # noqa: E731
    handle = supernet.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        image(pipeline, **arguments)
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def sampled(pipeline, answer):
    """Latents of a loop over the steps, written out: `answer` gives what the denoiser's output is at latents and t."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    unet = pipeline.unet
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = answer(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents


def models_and_prompts(pipeline):
    small, large = (Supernet.of(pipeline.unet).extract(size) for size in (SMALL, LARGE))
    prompts = pipeline.encode_prompt("a b", "cpu", 1, True)
    return small, large, *prompts


CALL = {"num_inference_steps": STEPS, "output_type": "latent"}


def test_the_unconditional_half_is_that_of_the_small_size(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    small, large, prompt, nothing = models_and_prompts(pipeline)

    def answer(latents, t):
        unconditional = small(latents, t, nothing).sample
        return unconditional + SCALE * (large(latents, t, prompt).sample - unconditional)

    expected = sampled(pipeline, answer)
    guided = image(pipeline, size=LARGE, guidance_size=SMALL, guidance_scale=SCALE, **CALL)
    assert torch.allclose(guided, expected, atol=1e-4, rtol=1e-4)
    usual = image(pipeline, size=LARGE, guidance_scale=SCALE, **CALL)
    assert (usual - expected).abs().max() > 100 * (guided - expected).abs().max()


def test_autoguidance_leads_away_from_the_small_size(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    small, large, prompt, _ = models_and_prompts(pipeline)

    def answer(latents, t):
        bad = small(latents, t, prompt).sample
        return bad + 2.0 * (large(latents, t, prompt).sample - bad)

    expected = sampled(pipeline, answer)
    told = {"size": LARGE, "guidance_size": SMALL, "guidance_scale": 1.0, **CALL}
    assert torch.allclose(image(pipeline, autoguidance_scale=2.0, **told), expected, atol=1e-4, rtol=1e-4)
    # At a scale of 1 it is the model as it is, bit for bit.
    plain = image(pipeline, size=LARGE, guidance_scale=1.0, **CALL)
    assert torch.equal(image(pipeline, autoguidance_scale=1.0, **told), plain)


@pytest.mark.parametrize("size", [SMALL, LARGE, SizeSchedule([SMALL, LARGE])])
def test_a_size_that_guides_itself_changes_nothing(pipeline, size):
    assert np.array_equal(image(pipeline, size=size, guidance_size=size), image(pipeline, size=size))
    auto = {"guidance_scale": 1.0, "guidance_size": size, "autoguidance_scale": 3.0}
    assert np.array_equal(image(pipeline, size=size, **auto), image(pipeline, size=size, guidance_scale=1.0))


def test_each_half_is_a_forward_and_the_next_call_is_as_before(pipeline):
    pipeline.set_size(SMALL)
    seen = forwards(pipeline, size=LARGE, guidance_size=SMALL, num_inference_steps=2)
    trial = [(LARGE, 2), (LARGE, 1), (LARGE, 1)]
    assert seen == [*trial, *[(SMALL, 1), (LARGE, 1)] * 2]
    assert pipeline.size == SMALL and forwards(pipeline, num_inference_steps=2) == [(SMALL, 2)] * 2
    schedules = {"size": SizeSchedule([SMALL, LARGE]), "guidance_size": "smallest"}
    assert forwards(pipeline, num_inference_steps=2, **schedules) == [(SMALL, 2), *seen[3:5]]


class Mixing(AttnProcessor2_0):
    """Shows every sample of a batch the first one's text."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states[:1].expand_as(encoder_hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, **others)


def test_how_a_batch_is_split_is_tried_once_for_shapes_and_processors(pipeline):
    call = {"size": LARGE, "guidance_size": SMALL, "num_inference_steps": 1}
    halves, trial = [(SMALL, 1), (LARGE, 1)], [(LARGE, 2), (LARGE, 1), (LARGE, 1)]
    assert forwards(pipeline, **call) == [*trial, *halves]
    assert forwards(pipeline, **call) == halves
    two = [(size, 2 * rows) for size, rows in (*trial, *halves)]
    assert forwards(pipeline, num_images_per_prompt=2, **call) == two
    pipeline.unet.set_attn_processor(Mixing())
    with pytest.raises(ValueError, match="mixes samples"):
        image(pipeline, **call)
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    assert forwards(pipeline, **call) == halves


def test_controlnets_callbacks_and_several_images_work_with_it(pipeline):
    made = OFAPipeline.from_pipe(pipeline, AutoPipelineForText2Image, controlnet=make_controlnet(pipeline.unet))
    told = []

    def tell(pipe, step, timestep, tensors):
        told.append(pipe.size)
        return {}

    arguments = {"prompt": ["a b", "c"], "num_images_per_prompt": 2, "image": PICTURE, "callback_on_step_end": tell}
    alike = image(made, size=LARGE, **arguments)
    guided = image(made, size=LARGE, guidance_size=SMALL, **arguments)
    assert len(guided) == 4 and told == [LARGE] * 4 and not np.allclose(guided, alike, atol=1e-3)


def test_a_transformer_with_the_conditional_half_first_and_a_learned_variance(tmp_path):
    torch.manual_seed(0)
    changes = {"in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2, "num_layers": 2}
    transformer = DiTTransformer2DModel(
        **changes, num_attention_heads=2, attention_head_dim=16, num_embeds_ada_norm=1000, norm_num_groups=4
    ).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(latent_channels=4, sample_size=8)
    make_supernet(transformer, sizes=(0.9, LARGE))
    scheduler = DDIMScheduler()
    DiTPipeline(transformer, vae, scheduler).save_pretrained(tmp_path)
    pipeline = OFAPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def tell(module, args, kwargs):
        seen.append((pipeline.size, kwargs["class_labels"].tolist()))

    handle = pipeline.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    call = {"class_labels": [3], "num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    pipeline(size=LARGE, guidance_size=0.9, output_type="np", **call)
    handle.remove()
    assert seen[-2:] == [(LARGE, [3]), (0.9, [1000])]
    auto = {"guidance_scale": 1.0, "guidance_size": 0.9, "autoguidance_scale": 2.0, "output_type": "np"}
    guided, plain = pipeline(**auto, **call).images, pipeline(guidance_scale=1.0, output_type="np", **call).images
    assert guided.shape == plain.shape and not np.allclose(guided, plain, atol=1e-3)


def test_models_without_guidance_of_their_own_have_autoguidance(tmp_path):
    unet = make_unet("scale_shift")
    make_supernet(unet, sizes=(SMALL, LARGE))
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    pipeline = OFAPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)

    def sample(**arguments):
        generator = torch.Generator().manual_seed(0)
        labels = {"class_labels": [1, 2]} if unet.config.num_class_embeds else {"batch_size": 2}
        return pipeline(**labels, num_inference_steps=2, generator=generator, output_type="np", **arguments).images

    assert not np.allclose(sample(guidance_size=SMALL, autoguidance_scale=2.0), sample(), atol=1e-3)
    with pytest.raises(ValueError, match=r"guidance_size is given, but which half of a .*DDPMPipeline's guidance"):
        sample(guidance_size=SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_size": 0.3}, r"size is 0\.3; it must be one of 0\.6, 1"),
        ({"guidance_size": SMALL, "guidance_scale": 1.0}, r"but guidance_scale is 1; it must be above 1"),
        ({"guidance_size": SMALL, "guidance_scale": 0, "prompt": ["a", "b"]}, r"but guidance_scale is 0; it must be"),
        ({"autoguidance_scale": 2.0}, r"but no guidance_size, which says what the bad model is"),
        (
            {"guidance_size": SMALL, "autoguidance_scale": 0.5, "guidance_scale": 1.0},
            r"autoguidance_scale is 0\.5; it must be a number from 1 on",
        ),
        (
            {"guidance_size": SMALL, "autoguidance_scale": float("nan"), "guidance_scale": 1.0},
            r"autoguidance_scale is nan",
        ),
        (
            {"guidance_size": SMALL, "autoguidance_scale": 2.0},
            r"a StableDiffusionPipeline's own guidance_scale is 7\.5 by default: say guidance_scale as well",
        ),
    ],
)
def test_what_cannot_guide_is_one_error(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        image(pipeline, **{"size": LARGE, **arguments})
    assert pipeline.size == LARGE
    image(pipeline)  # and the next call is as usual


@pytest.mark.parametrize("rows", [1, 2])
def test_a_pipeline_that_does_without_guidance_is_noticed(pipeline, rows, monkeypatch):
    monkeypatch.setattr(type(pipeline), "do_classifier_free_guidance", False)
    with pytest.raises(ValueError, match=f"called with {rows} samples that are not twice .* must be above 1"):
        image(pipeline, size=LARGE, guidance_size=SMALL, num_images_per_prompt=rows)


def test_guidance_may_end_on_the_way(pipeline):
    def end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if step == 0 else {}

    # Two samples of one noise: without guidance, too, the halves of the batch have the same latents.
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    for several in ({}, {"prompt": ["a", "a"], "latents": latents}):
        call = {
            "num_inference_steps": 3,
            "callback_on_step_end": end,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            **several,
        }
        count = 2 if several else 1
        seen = forwards(pipeline, size=LARGE, guidance_size=SMALL, **call)
        assert seen[-4:] == [(SMALL, count), (LARGE, count), (LARGE, count), (LARGE, count)]
    assert np.array_equal(image(pipeline, guidance_size=LARGE, **call), image(pipeline, **call))


def test_without_a_size_the_one_that_is_set_counts_and_an_error_leaves_it(pipeline):
    def shrink(pipe, step, timestep, tensors):
        pipe.set_size(SMALL)
        return tensors

    seen = forwards(pipeline, guidance_size=SMALL, num_inference_steps=2, callback_on_step_end=shrink)
    assert seen[-3:] == [(SMALL, 1), (LARGE, 1), (SMALL, 2)] and pipeline.size == SMALL
    pipeline.set_size(LARGE)

    def fail(*call):
        if pipeline.size == SMALL:
            raise KeyboardInterrupt

    pipeline.unet.conv_in.register_forward_hook(fail)
    for arguments in ({}, {"autoguidance_scale": 2.0, "guidance_scale": 1.0}):
        with pytest.raises(KeyboardInterrupt):
            image(pipeline, guidance_size=SMALL, **arguments)
        assert pipeline.size == LARGE


def test_pipelines_that_it_cannot_work_in_are_refused(pipeline, folder):
    perturbed = OFAPipeline.from_pipe(pipeline, StableDiffusionPAGPipeline)
    with pytest.raises(ValueError, match=r"which half of a StableDiffusionPAGPipeline's .*\.HALVES must have an entry"):
        image(perturbed, size=LARGE, guidance_size=SMALL)
    with pytest.raises(ValueError, match=r"guidance_size is 0\.6, but this .* was extracted at size 1"):
        image(pipeline.extract(LARGE), guidance_size=SMALL)
    with pytest.raises(ValueError, match=r"size is 0\.6; it must be one of 1"):
        image(load(folder, size=LARGE), guidance_size=SMALL)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with pytest.raises(ValueError, match=r"compile the unet in place, pipeline\.unet\.compile\(\)"):
        image(pipeline, size=LARGE, guidance_size=SMALL)


def test_diffusers_code_names_the_first_half_the_unconditional_one():
    wanted = {name for name, halves in HALVES.items() if halves is Halves.UNCONDITIONAL_FIRST}
    found = {}
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = file.read_text(encoding="utf-8")
        for name in wanted & set(re.findall(r"^class (\w+)\(", text, re.MULTILINE)):
            pairs = re.findall(r"(\w+), (\w+) = \w+\.chunk\(2", text)
            found[name] = [pair for pair in pairs if "uncond" in "".join(pair)]
    found = {name: pairs for name, pairs in found.items() if not name.endswith("CombinedPipeline")}  # of others
    assert len(found) > 80
    assert {
        name for name, pairs in found.items() if not pairs or any("uncond" not in first for first, _ in pairs)
    } == set()

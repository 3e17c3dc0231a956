"""Sizes that change from step to step."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import make_supernet, make_unet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from test_tasks import make_controlnet
from tiny_pipelines import PICTURE, image, load, make_checkpoint

from ofadiff import OFAPipeline, SizeSchedule
from ofadiff.pipelines.steps import as_share, as_share_of_the_way, as_they_are, as_way, distinct, step_of

SMALL, LARGE = 0.6, 1.0

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sd") / "checkpoint")


@pytest.fixture
def pipeline(folder):
    return load(folder)


def sizes_of(pipeline, **arguments):
    """The size of each forward of a call, and its images."""
    seen = []
    supernet = pipeline.supernet
    handle = supernet.model.conv_in.register_forward_hook(lambda *call: seen.append(supernet.size))
    try:
        return seen, image(pipeline, **arguments)
    finally:
        handle.remove()


@contextmanager
def pipeline_hook(pipeline, hook):
    handle = pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_each_step_runs_at_its_size_and_the_next_call_as_before(pipeline):
    pipeline.set_size(SMALL)
    schedule = SizeSchedule([SMALL, LARGE, LARGE, SMALL])
    seen, mixed = sizes_of(pipeline, size=schedule, num_inference_steps=4)
    assert seen == [*schedule] and pipeline.size == SMALL and not pipeline.unet._forward_pre_hooks
    for size in (SMALL, LARGE):
        same = image(pipeline, size=size, num_inference_steps=4)
        assert np.array_equal(image(pipeline, size=SizeSchedule([size] * 4), num_inference_steps=4), same)
        assert np.abs(mixed - same).max() > 1e-4
    # Other numbers of steps: the size at the same share of the way.
    assert sizes_of(pipeline, size=SizeSchedule([SMALL, LARGE]), num_inference_steps=5)[0] == [
        *[SMALL] * 2,
        *[LARGE] * 3,
    ]
    assert sizes_of(pipeline, size=schedule, num_inference_steps=2)[0] == [LARGE, SMALL]


def test_image_to_image_begins_in_the_middle_of_the_schedule(pipeline):
    made = OFAPipeline.from_pipe(pipeline, AutoPipelineForImage2Image)
    halves = SizeSchedule([LARGE, SMALL])
    called = {"image": PICTURE, "num_inference_steps": 8, "size": halves}
    assert sizes_of(made, strength=0.75, **called)[0] == [LARGE] * 2 + [SMALL] * 4
    assert sizes_of(made, strength=0.5, **called)[0] == [SMALL] * 4


@pytest.mark.parametrize("scheduler", [DDPMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_it_follows_every_scheduler(pipeline, scheduler):
    pipeline.scheduler = scheduler(beta_schedule="squaredcos_cap_v2")
    seen, _ = sizes_of(pipeline, size=SizeSchedule([SMALL, LARGE]), num_inference_steps=4)
    # Heun's looks at every noise level twice, but for the first one.
    expected = [SMALL] * 3 + [LARGE] * 4 if scheduler is HeunDiscreteScheduler else [SMALL] * 2 + [LARGE] * 2
    assert seen == expected


def test_controlnets_loras_and_callbacks_work_with_it(pipeline, tmp_path):
    made = OFAPipeline.from_pipe(pipeline, AutoPipelineForText2Image, controlnet=make_controlnet(pipeline.unet))
    told = []

    def tell(pipe, step, timestep, tensors):
        told.append(pipe.size)
        return {"latents": tensors["latents"] * 0.9}

    arguments = {"image": PICTURE, "num_inference_steps": 3, "callback_on_step_end": tell}
    seen, mixed = sizes_of(made, size=SizeSchedule([SMALL, LARGE, SMALL]), **arguments)
    assert seen == told == [SMALL, LARGE, SMALL]
    same = image(made, size=SMALL, **arguments)
    assert np.array_equal(image(made, size=SizeSchedule([SMALL]), **arguments), same) and not np.array_equal(
        mixed, same
    )


@pytest.mark.parametrize("outer", [{"size": SizeSchedule([LARGE])}, {"size": LARGE, "guidance_size": SMALL}])
def test_a_call_inside_of_a_call_has_its_own_size(pipeline, outer):
    other = OFAPipeline.from_pipe(
        pipeline, AutoPipelineForText2Image, scheduler=DDIMScheduler.from_config(pipeline.scheduler.config)
    )
    alone = image(other, size=SMALL)
    inner = []

    def look(pipe, step, timestep, tensors):
        seen, inside = sizes_of(other, size=SMALL)
        with pipe.supernet.at(SMALL) as unet:
            unet(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 12, 16))
            seen.append(pipe.supernet.size)
        inner.append((seen, np.array_equal(inside, alone)))
        return tensors

    expected = image(pipeline, **outer)
    assert np.array_equal(image(pipeline, callback_on_step_end=look, **outer), expected)
    assert inner == [([SMALL] * 3, True)] * 2 and pipeline.size == LARGE


def test_a_compiled_denoiser_follows_it(pipeline):
    schedule = SizeSchedule([SMALL, LARGE])
    expected = image(pipeline, size=schedule)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert np.allclose(image(pipeline, size=schedule), expected, atol=1e-5)


def test_a_class_conditional_pixel_model_follows_it(tmp_path):
    unet = make_unet("scale_shift")
    make_supernet(unet, sizes=(SMALL, LARGE))
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    pipeline = OFAPipeline.from_pretrained(tmp_path)
    seen = []
    pipeline.unet.register_forward_hook(lambda *call: seen.append(pipeline.size))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(size=SizeSchedule([LARGE, SMALL]), class_labels=[1, 2], num_inference_steps=4)
    assert seen == [LARGE] * 2 + [SMALL] * 2


def test_bad_schedules_are_one_sentence(folder, pipeline):
    for sizes, message in [
        ([], "sizes is empty"),
        ([0.6, 0], "has 0"),
        (["large"], "'large'"),
        ("0.6", r"'0\.6'"),
        ([True], "True"),
        (None, "None"),
    ]:
        with pytest.raises(ValueError, match=message):
            SizeSchedule(sizes)
    assert SizeSchedule(np.float64(1)) == SizeSchedule([np.int64(1)]) == SizeSchedule([1.0])
    for measured in ({"images": torch.zeros(1)}, {"distance": float("nan")}):
        with pytest.raises(ValueError, match="measured cannot be kept as JSON"):
            SizeSchedule([SMALL], measured)
    for schedule in ([SMALL, LARGE], SMALL):
        with pytest.raises(ValueError, match=r"the schedule is .*0\.6.*; it must be a SizeSchedule, or None"):
            pipeline.set_schedule("fast", schedule)
    with pytest.raises(ValueError, match=r"size is 0\.7; it must be one of 0\.6, 1"):
        image(pipeline, size=SizeSchedule([SMALL, 0.7]))
    for steps in (0, 2.5, True, None):
        with pytest.raises(ValueError, match=f"steps is {steps}; it must be a whole number of at least 1"):
            SizeSchedule([SMALL]).over(steps)
    one = load(folder, size=SMALL)
    assert np.array_equal(image(one, size=SizeSchedule([SMALL])), image(one))
    with pytest.raises(ValueError, match=r"size is 1\.0; it must be one of 0\.6"):
        image(one, size=SizeSchedule([SMALL, LARGE]))
    with pytest.raises(ValueError, match="was extracted at size"):
        image(pipeline.extract(SMALL), size=SizeSchedule([SMALL]))


def test_a_step_that_is_no_step_of_the_scheduler_is_an_error(pipeline):
    def elsewhere(module, args, kwargs):
        return (args[0], args[1] * 0 + 5000, *args[2:]), kwargs

    with (
        pipeline_hook(pipeline, elsewhere),
        pytest.raises(ValueError, match="called at timestep 5000, which is none of"),
    ):
        image(pipeline, size=SizeSchedule([SMALL]))
    assert not pipeline.unet._forward_pre_hooks and pipeline.size == LARGE


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("convention", [as_they_are, as_share, as_share_of_the_way, as_way])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_told_from_what_denoisers_are_given(steps, convention, dtype):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    timesteps = distinct(scheduler.timesteps)
    falling = convention in (as_they_are, as_share)
    conventions = (as_they_are, as_share) if falling else (as_share_of_the_way, as_way)
    found = []
    for value in convention(timesteps, 1000).to(dtype):
        step, conventions = step_of(float(value), timesteps, 1000, conventions)
        found.append(step)
    assert convention in conventions
    # bfloat16 itself confuses neighbours of a thousand steps.
    assert max(abs(step - each) for step, each in enumerate(found)) <= (steps // 100 if dtype is torch.bfloat16 else 0)

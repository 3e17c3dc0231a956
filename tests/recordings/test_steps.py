"""In pipelines of many kinds a call of the denoiser tells which of the scheduler's steps it belongs to."""

import pytest
from diffusers import DiffusionPipeline
from recordings.tiny_pipelines import CALLS, COMPONENT

from ofadiff.pipelines.calls import check_calls, opened
from ofadiff.pipelines.steps import conventions_of, distinct, moment_of, step_of
from ofadiff.recordings.recorded_call import parameters_of, time_argument

pytestmark = pytest.mark.slow

# Shares of the way, as they are, and of other units; both halves of guidance apart; two denoisers; from the middle on.
KINDS = ("lumina2", "auraflow", "cogview4", "stable_audio", "qwen_image", "wan_2_2", "sd_img2img")


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_is_of_the_step_that_it_is_made_in(saved, kind):
    pipeline = DiffusionPipeline.from_pretrained(saved(kind) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    denoisers = [pipeline.components.get(name) for name in (COMPONENT[kind], "transformer_2")]
    found = []

    def tell(module, args, kwargs):
        parameters = parameters_of(module)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}[time_argument(parameters)]
        scheduler = pipeline.scheduler
        conventions = found[-1][1] if found else conventions_of(scheduler, module)
        trained = scheduler.config.num_train_timesteps
        found.append(step_of(moment_of(given), distinct(scheduler.timesteps), trained, conventions))

    for denoiser in filter(None, denoisers):
        denoiser.register_forward_pre_hook(tell, with_kwargs=True)
    (call,) = check_calls(type(pipeline), CALLS[kind][:1], folder=saved(kind))
    pipeline(**opened({**call, "num_inference_steps": 5}))
    steps = [step for step, _ in found]
    first = 1 if kind == "sd_img2img" else 0  # with a strength of 0.8
    halves = 2 if kind in ("lumina2", "cogview4", "qwen_image", "wan_2_2") else 1
    assert steps == [step for step in range(first, 5) for _ in range(halves)]

"""In pipelines of many kinds the unconditional half of guidance, and that alone, runs at the size for guidance."""

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from recordings.tiny_pipelines import CALLS, COMPONENT

from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, score_channels
from ofadiff.pipelines.calls import check_calls, opened
from ofadiff.recordings.nested import map_tensors
from ofadiff.recordings.recorded_call import parameters_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning")]

SMALL, LARGE = 0.92, 1.0

# Both halves in one batch, the unconditional one first or last, in tensors, in lists, with rows for each frame; in two
# calls, of one denoiser or of two.
KINDS = ("sd_img2img", "animatediff", "z_image", "lumina2", "qwen_image", "wan_2_2")


def with_sizes(folder, kind):
    """A checkpoint of a tiny pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    (call,) = check_calls(type(pipeline), CALLS[kind][:1], folder=folder)
    for name in ("unet", "transformer", "transformer_2"):
        denoiser = pipeline.components.get(name)
        if denoiser is not None:
            inputs = first_inputs(pipeline, denoiser, call)
            groups = find_channel_groups(denoiser)
            scores = score_channels(denoiser, groups, criterion="magnitude")
            Supernet(denoiser, groups, scores, allocate(denoiser, groups, scores, (SMALL, LARGE), inputs=inputs))
    pipeline.save_pretrained(folder / "with_sizes")
    return OFAPipeline.from_pretrained(folder / "with_sizes")


def first_inputs(pipeline, denoiser, call):
    """What a denoiser is called with first."""
    seen = []

    def note(module, args, kwargs):
        seen.append({**dict(zip(parameters_of(module), args, strict=False)), **kwargs})

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    pipeline(**opened(call))
    handle.remove()
    return seen[0]


def forwards(pipeline, folder, kind, **changes):
    """Size and arguments of both forwards of a call with one step."""
    seen = []

    def tell(module, args, kwargs):
        seen.append((module.ofa_state.size, tensors((args, kwargs))))

    denoisers = [pipeline.components.get(name) for name in (COMPONENT[kind], "transformer_2")]
    handles = [each.register_forward_pre_hook(tell, with_kwargs=True) for each in filter(None, denoisers)]
    (call,) = check_calls(pipeline._stock_class, CALLS[kind][:1], folder=folder)
    try:
        pipeline(**opened({**call, **changes, "num_inference_steps": 1}), generator=torch.Generator().manual_seed(0))
    finally:
        for handle in handles:
            handle.remove()
    return seen[-2:]  # before them it is tried whether the batch can be split


def tensors(value):
    found = []
    map_tensors(lambda tensor: found.append(tensor.clone()), value)
    return found


def test_a_cache_of_earlier_steps_is_refused(saved):
    pipeline = with_sizes(saved("qwen_image"), "qwen_image")
    apply_first_block_cache(pipeline.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"the transformer has a cache .* pipeline\.transformer\.disable_cache\(\)"):
        pipeline("a", size=LARGE, guidance_size=SMALL)


@pytest.mark.parametrize("kind", KINDS)
def test_the_half_that_the_prompt_does_not_change_is_the_small_one(saved, kind):
    pipeline = with_sizes(saved(kind), kind)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"size": LARGE, "guidance_size": SMALL, **({"strength": 1.0} if kind == "sd_img2img" else {})}
    first, second = (forwards(pipeline, saved(kind), kind, prompt=prompt, **sizes) for prompt in ("a b c", "d e f"))
    assert {size for size, _ in first} == {SMALL, LARGE}
    for (size, given), (_, other) in zip(first, second, strict=True):
        alike = len(given) == len(other) and all(map(torch.equal, given, other))
        assert alike == (size == SMALL)

"""The table of docs/deployment.md: what else is done to a pipeline goes together with sizes, as its lines say."""

import re
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from conftest import make_dropping_supernet, make_unet, output, random_inputs, relative_error
from diffusers import (
    DiffusionPipeline,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPipeline,
    hooks,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from recipes import tiny_text_to_image
from recordings import tiny_pipelines as recorded
from tiny_pipelines import make_checkpoint
from tiny_stable_diffusion import make_unet as make_sd_unet
from tiny_transformers import tiny, tiny_inputs
from versions import importable, needs_torchao, since, skip_if_older

from ofadiff import OFAPipeline, SizeSchedule, Supernet, allocate, find_channel_groups, score_channels
from ofadiff.layers import cut_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # and its FasterCache
]

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## What goes together")[2]
LINES = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if line.startswith("| ")][1:]
ROWS = {what: (how.strip("`"), sizes, size) for what, how, sizes, size, *_ in LINES}

SMALL, LARGE = 0.6, 1.0
STEPS = 6  # of caches
FEWER = {"LCM-LoRA": 4, "DeepCache": 4}  # 2 of any other line

# Packages whose names the lines use, and for which no pipeline is needed.
PACKAGES = {"DeepCache": "DeepCache", "token merging": "tomesd"}
# The pipeline that a line is run on, Stable Diffusion unless it is here; a line has to change the images, or must not.
KINDS = {
    "Pyramid Attention Broadcast": "flux",
    "FasterCache": "cogvideox",
    "First Block Cache": "flux",
    "TaylorSeer": "flux",
    "MagCache": "flux",
    "SeaCache": "wan",
}
CACHES = [*KINDS]
EXACT = {
    "group offloading, layers",
    "group offloading, blocks",
    "model offloading",
    "sequential offloading",
    "VAE tiling and slicing",  # images this small are one tile
}
ROUNDING = {"layerwise casting": 2e-2, "int8 weights": 1e-2, "int8 weights and activations": 2e-2}
CALLS = {
    "flux": {"prompt": "a b", "height": 32, "width": 32, "max_sequence_length": 16},
    "wan": recorded.CALLS["wan"][0],
    "cogvideox": {**recorded.CALLS["cogvideox"][0], "guidance_scale": 3.0},
    "sd": {"prompt": "a b"},
}

# Attention where there are the most tokens, which is where tokens are merged.
ATTENTION_ABOVE = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def make_sizes(model, inputs=None):
    """A supernet whose small size does without an attention, if it can."""
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    unimportant = [group.name for group in groups if "attention" in group.kind and group.droppable][-1:]
    scores |= {name: scores[name] * 1e-4 for name in unimportant}
    options = {"budget": "channels", "min_keep": 0, "inputs": inputs}
    supernet = Supernet(model, groups, scores, allocate(model, groups, scores, sizes=(SMALL, LARGE), **options))
    assert set(unimportant) <= set(supernet.subnets[0].dropped)
    return supernet


def first_inputs(pipeline, kind):
    """What a pipeline calls its transformer with first."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**{**CALLS[kind], "num_inference_steps": 1, "output_type": "latent"})
    hook.remove()
    return {name: value for name, value in seen[0].items() if name != "return_dict"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where an OFA checkpoint of each kind lies, with a LoRA of its original beside it."""
    made = {}

    def folder(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            save = {"flux": tiny_text_to_image.save_pipeline, "sd": None}.get(kind, recorded.save_pipeline)
            if save is None:
                make_checkpoint(place / "checkpoint", **ATTENTION_ABOVE)
                adapted = make_sd_unet(**ATTENTION_ABOVE)
                adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ff.net.2"]))
                lora = {name: torch.randn_like(side) * 0.3 for name, side in get_peft_model_state_dict(adapted).items()}
                StableDiffusionPipeline.save_lora_weights(place / "lcm-lora", unet_lora_layers=lora)
            else:
                save(kind, place / "checkpoint")
                pipeline = DiffusionPipeline.from_pretrained(place / "checkpoint")
                make_sizes(pipeline.transformer, first_inputs(pipeline, kind)).save_pretrained(
                    place / "checkpoint" / "transformer"
                )
            made[kind] = place
        return made[kind]

    return folder


def load(kind, folders, monkeypatch):
    monkeypatch.chdir(folders(kind))
    options = {"safety_checker": None} if kind == "sd" else {}
    pipeline = OFAPipeline.from_pretrained("checkpoint", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_of(pipeline):
    return pipeline.components["transformer" if "transformer" in pipeline.components else "unet"]


def run(what, pipeline, denoiser=None):
    """A line of the page, with what it takes for granted."""
    code, denoiser = ROWS[what][0], denoiser or denoiser_of(pipeline)
    names = {"pipeline": pipeline, "denoiser": denoiser, "torch": torch, "device": torch.device("cpu")}
    modules = [
        accelerate,
        diffusers,
        hooks,
        importable("diffusers.hooks.mag_cache"),
        importable("torchao.quantization"),
    ]
    if what == "LCM-LoRA":  # offline, an older diffusers wants the name of the file
        skip_if_older("diffusers", "way to load a LoRA from its folder offline")
    words = re.findall(r"\w+", code)
    for module in filter(None, modules):
        names |= {name: getattr(module, name) for name in words if hasattr(module, name)}
    for name in words:
        if name.endswith("Config") and name not in names:
            needs_torchao() if what in ROUNDING or what == "float8 weights" else skip_if_older("diffusers", name)
    if what in PACKAGES:
        package = pytest.importorskip(PACKAGES[what], reason=f"needs pip install {PACKAGES[what]}")
        names |= {package.__name__: package, **vars(package)}
    exec(code, names)


def sample(pipeline, kind, **arguments):
    call = {**CALLS[kind], "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipeline(generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


def far(images, others):
    return float(abs(images - others).max())


def both_ways(what):
    return [row for row, (_, sizes, size) in ROWS.items() if (sizes, size) == what]


@pytest.mark.parametrize("what", both_ways(("yes", "yes")))
def test_at_every_size_the_supernet_gives_what_the_extracted_model_gives(what, folders, monkeypatch):
    if what == "text keys and values":
        pytest.skip("tested on the denoiser alone, below")
    kind = KINDS.get(what, "sd")
    call = {} if what in CACHES else {"num_inference_steps": FEWER.get(what, 2)}
    pipeline = load(kind, folders, monkeypatch)
    small, large = (pipeline.extract(size) for size in (SMALL, LARGE))
    before = sample(large, kind, **call)
    for each in (pipeline, small, large):
        run(what, each)
    expected = {SMALL: sample(small, kind, **call), LARGE: sample(large, kind, **call)}
    assert (far(expected[LARGE], before) > 1e-5) == (what not in EXACT)
    assert far(expected[SMALL], expected[LARGE]) > 1e-4
    for size in (SMALL, LARGE, SMALL):
        assert far(sample(pipeline, kind, size=size, **call), expected[size]) < ROUNDING.get(what, 1e-5)


@pytest.mark.parametrize("what", [what for what in CACHES if what != "MagCache"])
def test_a_cache_begins_anew_where_a_schedule_changes_the_size(what, folders, monkeypatch):
    pipeline = load(KINDS[what], folders, monkeypatch)
    first, then = pipeline.extract(LARGE), pipeline.extract(SMALL).transformer
    run(what, pipeline)
    run(what, first)
    run(what, first, then)

    def swap(pipe, step, timestep, tensors):
        if step == STEPS // 2 - 1:
            pipe.transformer = then
        return tensors

    expected = sample(first, KINDS[what], callback_on_step_end=swap)
    schedule = SizeSchedule([LARGE] * (STEPS // 2) + [SMALL] * (STEPS // 2))
    assert far(sample(pipeline, KINDS[what], size=schedule), expected) < 1e-5
    pipeline.transformer.disable_cache()
    plain = load(KINDS[what], folders, monkeypatch)
    for size in (SMALL, LARGE):
        assert far(sample(pipeline, KINDS[what], size=size), sample(plain, KINDS[what], size=size)) < 1e-6


@pytest.mark.parametrize(
    "apply, config, options",
    [
        ("apply_first_block_cache", "FirstBlockCacheConfig", {"threshold": 0.5}),
        ("apply_taylorseer_cache", "TaylorSeerCacheConfig", {"cache_interval": 3, "disable_cache_before_step": 2}),
    ],
    ids=["First Block Cache", "TaylorSeer"],
)
def test_caches_that_are_applied_by_hand_begin_anew_too(apply, config, options, folders, monkeypatch):
    apply, config = since(f"diffusers.hooks.{apply}"), since(f"diffusers.{config}")(**options)
    pipeline, enabled = load("flux", folders, monkeypatch), load("flux", folders, monkeypatch)
    apply(pipeline.transformer, config)
    enabled.transformer.enable_cache(config)
    schedule = SizeSchedule([LARGE] * (STEPS // 2) + [SMALL] * (STEPS // 2))
    expected = sample(enabled, "flux", size=schedule)
    assert far(sample(pipeline, "flux", size=schedule), expected) < 1e-6
    assert far(sample(load("flux", folders, monkeypatch), "flux", size=schedule), expected) > 1e-5


def test_magcache_forgets_what_another_size_computed_and_counts_on(folders, monkeypatch):
    pipeline = load("flux", folders, monkeypatch)
    run("MagCache", pipeline)
    seen = []

    def look(pipe, step, timestep, tensors):
        (state,) = (
            pipe.transformer.transformer_blocks[0]
            ._diffusers_hook.hooks["mag_cache_leader_block_hook"]
            .state_manager._state_cache.values()
        )
        if step == 2:
            pipe.set_size(SMALL)
            assert state.previous_residual is None
        seen.append((state.step_index, state.should_compute))
        return tensors

    sample(pipeline, "flux", callback_on_step_end=look)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 0] and seen[3][1]
    assert not all(computed for _, computed in seen)


def test_text_keys_and_values_are_those_of_the_size():
    name = "NucleusMoEImageTransformer2DModel"
    inputs, model = tiny_inputs(name), tiny(name, num_attention_heads=8)
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    options = {"budget": "channels", "inputs": inputs}
    supernet = Supernet(model, groups, scores, allocate(model, groups, scores, sizes=(SMALL, LARGE), **options))
    small = supernet.extract(SMALL)
    expected = {SMALL: output(small, inputs), LARGE: output(model, inputs)}
    for denoiser in (model, small):
        names = {"denoiser": denoiser, "TextKVCacheConfig": since("diffusers.TextKVCacheConfig")}
        exec(ROWS["text keys and values"][0], names)
    assert relative_error(output(small, inputs), expected[SMALL]) < 1e-6
    for size in (SMALL, LARGE, SMALL):  # with the same text, that is one entry of the cache
        supernet.set_size(size)
        for _ in range(2):
            assert relative_error(output(model, inputs), expected[size]) < 1e-6


def test_weights_that_are_cast_or_moved_are_not_held_in_a_call(folders, monkeypatch):
    for what in ("layerwise casting", "group offloading, layers", "group offloading, blocks"):
        pipeline = load("sd", folders, monkeypatch)
        assert pipeline._weights_stay((), {})
        run(what, pipeline)
        assert not pipeline._weights_stay((), {})


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_weights_may_lie_on_the_disk_between_forwards(kind, folders, monkeypatch, tmp_path):
    pipeline = load("sd", folders, monkeypatch)
    expected = {size: sample(pipeline, "sd", size=size, num_inference_steps=2) for size in (SMALL, LARGE)}
    place = {"offload_to_disk_path": str(tmp_path), "onload_device": torch.device("cpu"), "num_blocks_per_group": 1}
    pipeline.unet.enable_group_offload(offload_type=kind, **place)
    assert [*tmp_path.iterdir()]
    for size in (SMALL, LARGE):
        assert torch.equal(sample(pipeline, "sd", size=size, num_inference_steps=2), expected[size])


def test_what_cannot_go_together_says_so(folders, monkeypatch):
    needs_torchao()
    pipeline = load("sd", folders, monkeypatch)
    small = pipeline.extract(SMALL)
    for each in (pipeline, small):
        with pytest.raises(ValueError, match="tensor parallelism gives every process the same number of heads"):
            run("tensor parallelism", each)
        run("float8 weights", each)
    assert sample(small, "sd", num_inference_steps=1).isfinite().all()
    assert sample(pipeline, "sd", num_inference_steps=1, size=LARGE).isfinite().all()
    with pytest.raises(
        ValueError, match="is quantized to a Float8Tensor; the sizes of a supernet follow an Int8Tensor"
    ):
        sample(pipeline, "sd", num_inference_steps=1, size=SMALL)
    assert {row for row, cells in ROWS.items() if "error" in cells[1:]} == {"float8 weights", "tensor parallelism"}


def test_deepcache_holds_one_size_alone(folders, monkeypatch):
    pipeline = load("sd", folders, monkeypatch)
    run("DeepCache", pipeline)
    expected = sample(pipeline, "sd", size=SMALL)
    assert torch.equal(sample(pipeline, "sd", size=SizeSchedule([SMALL, SMALL])), expected)
    for arguments in ({"size": SizeSchedule([SMALL, LARGE])}, {"size": LARGE, "guidance_size": SMALL}):
        with pytest.raises(ValueError, match=r"the unet has DeepCache, which would .* call its helper's disable\(\)"):
            sample(pipeline, "sd", **arguments)


@pytest.mark.parametrize("name", ["sd15", "DiTTransformer2DModel"])
def test_int8_weights_of_a_supernet_are_as_close_as_those_of_a_size(name):
    quantization = needs_torchao()
    model = make_unet(name) if name == "sd15" else tiny(name)
    inputs = random_inputs(model)
    supernet = make_dropping_supernet(model, (0.6, 0.8, LARGE))
    assert 0 in supernet.subnets[0].widths.values()
    smaller = {size: supernet.extract(size) for size in supernet.sizes}
    exact = {size: output(small, inputs) for size, small in smaller.items()}
    for each in (model, *smaller.values()):
        exec(ROWS["int8 weights"][0], {"denoiser": each, **vars(quantization)})
    for size in (*supernet.sizes, supernet.sizes[0]):
        with supernet.at(size), cut_once():
            found, again = output(model, inputs), output(model, inputs)
        expected = output(smaller[size], inputs)
        assert torch.equal(found, again)
        assert relative_error(found, expected) < 2e-2
        assert 0 < relative_error(found, exact[size]) < 1.5 * relative_error(expected, exact[size])
    assert torch.equal(output(model, inputs), output(smaller[LARGE], inputs))  # nothing is cut there


def test_a_quantized_model_is_saved_by_diffusers_way_alone(tmp_path):
    quantization = needs_torchao()
    supernet = make_dropping_supernet(tiny("DiTTransformer2DModel"), (0.6, LARGE))
    inputs = tiny_inputs("DiTTransformer2DModel")
    small = supernet.extract(0.6)
    small.save_pretrained(tmp_path / "small")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = type(small).from_pretrained(tmp_path / "small", quantization_config=config, torch_dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(small).from_pretrained(tmp_path / "quantized", torch_dtype=torch.float32)
    assert 0 < relative_error(output(loaded, inputs), output(small, inputs)) < 2e-2
    assert (
        torch.equal(output(again, inputs), output(loaded, inputs)) and again.ofa_basis.keys() == small.ofa_basis.keys()
    )
    for model in (supernet.model, small):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match=r"is quantized, a Int8Tensor; save the .* before quantizing it"):
            model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="extract a size before quantizing"):
        supernet.extract(0.6)


def test_a_hook_on_an_attention_that_a_size_may_drop_comes_after_the_supernet():
    model = tiny("FluxTransformer2DModel")
    options = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}
    model.enable_cache(PyramidAttentionBroadcastConfig(**options))
    with pytest.raises(ValueError, match=r"attn has a hook in place of its forward \(a cache"):
        make_dropping_supernet(model, (0.6, LARGE))

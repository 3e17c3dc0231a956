"""A size that is asked for is the size that is used, or an error, whatever the denoiser is reached by."""

import json
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_supernet, make_unet, output, random_inputs, relative_error
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_pipelines import MASK, PICTURE, SIZES, image, load, make_checkpoint
from tiny_transformers import tiny, tiny_inputs

from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, score_channels

CUSTOM = """
from diffusers import {base}

class {name}({base}):
    def __call__(self, *args, **kwargs):
        self.called = True
        return super().__call__(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sd") / "checkpoint")


@pytest.fixture(scope="module")
def ddpm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "checkpoint"
    unet = make_unet("plain")
    make_supernet(unet, sizes=SIZES)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)  # a plain pipeline saves the sizes too
    return folder


def pixels(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np", **arguments
    ).images


@pytest.mark.parametrize(("kind", "base"), [("sd", "StableDiffusionPipeline"), ("ddpm", "DDPMPipeline")])
@pytest.mark.parametrize("size", [None, 0.6])
def test_a_custom_pipeline_gets_sizes(folder, ddpm_folder, tmp_path, kind, base, size):
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "pipeline.py").write_text(CUSTOM.format(base=base, name="Mine"))
    where, sample = (folder, image) if kind == "sd" else (ddpm_folder, pixels)
    options = {"safety_checker": None} if kind == "sd" else {}
    plain = OFAPipeline.from_pretrained(where, **options)
    pipeline = OFAPipeline.from_pretrained(
        where, size, custom_pipeline=str(tmp_path / "custom"), trust_remote_code=True, **options
    )
    assert isinstance(pipeline, OFAPipeline) and type(pipeline).__name__ == "Mine"
    small = sample(pipeline, size=0.6)
    assert pipeline.called and np.allclose(small, sample(plain, size=0.6), atol=1e-5)
    assert not np.allclose(small, sample(plain, size=1.0), atol=1e-3)
    with pytest.raises(ValueError, match=r"size is 0\.7; it must be one of"):
        pipeline(size=0.7)
    if size is None:
        pipeline.save_pretrained(tmp_path / "saved")
        again = OFAPipeline.from_pretrained(
            tmp_path / "saved", custom_pipeline=str(tmp_path / "custom"), trust_remote_code=True
        )
        assert type(again).__name__ == "Mine" and np.array_equal(sample(again, size=0.6), small)


def test_extracted_pipelines_refuse_a_size(folder, ddpm_folder):
    for pipeline, sample in ((load(folder), image), (OFAPipeline.from_pretrained(ddpm_folder), pixels)):
        extracted = pipeline.extract(0.6)
        for size in (1.0, 0.6, "largest"):
            with pytest.raises(ValueError, match=r"was extracted at size 0\.6 and has no other"):
                sample(extracted, size=size)
        assert np.allclose(sample(extracted), sample(pipeline, size=0.6), atol=1e-5)
        assert not isinstance(extracted, OFAPipeline)


@pytest.mark.parametrize("kind", ["sd", "ddpm"])
def test_a_pipeline_whose_denoiser_was_replaced_has_no_sizes(folder, ddpm_folder, kind):
    where, sample = (folder, image) if kind == "sd" else (ddpm_folder, pixels)
    options = {"safety_checker": None} if kind == "sd" else {}
    for size in (None, 0.6):
        pipeline = OFAPipeline.from_pretrained(where, size, **options)
        pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config) if size is None else pipeline.unet
        if size is not None:
            pipeline.unet = OFAPipeline.from_pretrained(where, 1.0, **options).unet
        with pytest.raises(ValueError, match="than it was loaded with, and that has no sizes"):
            sample(pipeline, size=0.6)


def test_plain_pipelines_around_a_supernet_keep_its_sizes(folder, tmp_path):
    pipeline = load(folder)
    plain = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    plain.save_pretrained(tmp_path / "plain")
    plain.unet.save_pretrained(tmp_path / "alone")
    DiffusionPipeline.from_pretrained(folder, safety_checker=None, unet=pipeline.unet).save_pretrained(
        tmp_path / "given"
    )
    inputs = random_inputs(pipeline.unet)
    for unet_folder in (tmp_path / "plain" / "unet", tmp_path / "alone", tmp_path / "given" / "unet"):
        loaded = Supernet.from_pretrained(unet_folder)
        for size in SIZES:
            pipeline.set_size(size)
            loaded.set_size(size)
            assert torch.equal(output(loaded.model, inputs), output(pipeline.unet, inputs))
    again = OFAPipeline.from_pretrained(tmp_path / "plain")
    assert type(again).__name__ == "StableDiffusionImg2ImgPipeline" and again.sizes == SIZES


def test_the_denoiser_passes_for_its_stock_class(folder):
    pipeline = load(folder)
    unet = pipeline.unet
    assert type(unet) == UNet2DConditionModel and isinstance(unet, UNet2DConditionModel)  # noqa: E721
    assert type(unet).__name__ == "UNet2DConditionModel" and Supernet.of(torch.compile(unet)).sizes == SIZES
    fresh = type(unet).from_config(unet.config)
    fresh.fuse_qkv_projections()  # a model that is no supernet does what its stock class does
    with pytest.raises(ValueError, match="this UNet2DConditionModel is no supernet"):
        Supernet.of(fresh)


@pytest.mark.parametrize("size", [0.6, 1.0])
def test_diffusers_own_from_pipe_takes_an_extracted_pipeline(folder, tmp_path, size):
    pipeline = load(folder)
    pipeline.extract(size).save_pretrained(tmp_path / "small")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small", safety_checker=None)
    tasks = {
        StableDiffusionImg2ImgPipeline: {"image": PICTURE, "strength": 0.9},
        StableDiffusionInpaintPipeline: {"image": PICTURE, "mask_image": MASK, "strength": 0.9},
        StableDiffusionPAGPipeline: {"pag_scale": 2.0},
    }
    for pipeline_class, inputs in tasks.items():
        expected = image(OFAPipeline.from_pipe(pipeline, pipeline_class), size=size, **inputs)
        for source in (pipeline.extract(size), loaded):
            made = pipeline_class.from_pipe(source)
            assert made.unet is source.unet and type(made) is pipeline_class
            assert np.allclose(image(made, **inputs), expected, atol=1e-5)


def test_what_chooses_a_class_gets_its_options(folder):
    pipeline = load(folder)
    made = OFAPipeline.from_pipe(pipeline, AutoPipelineForText2Image, enable_pag=True, pag_applied_layers=["mid"])
    assert isinstance(made, StableDiffusionPAGPipeline) and made.sizes == SIZES and made.unet is pipeline.unet
    for size in SIZES:
        stock = AutoPipelineForText2Image.from_pipe(pipeline.extract(size), enable_pag=True, pag_applied_layers=["mid"])
        assert np.allclose(image(made, size=size, pag_scale=2.0), image(stock, pag_scale=2.0), atol=1e-5)
    plain = OFAPipeline.from_pipe(made, AutoPipelineForText2Image, enable_pag=False)
    assert not isinstance(plain, StableDiffusionPAGPipeline) and plain.sizes == SIZES


def test_threads_that_share_a_supernet_get_the_sizes_that_they_ask_for(folder):
    pipeline = load(folder)
    expected = {size: image(pipeline, size=size) for size in SIZES}
    pipeline.set_size(1.0)
    sys.setswitchinterval(1e-5)
    try:

        def sample(job):
            size, kind = SIZES[job % 2], job // 2 % 3
            scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
            if kind == 0:
                made = OFAPipeline.from_pipe(pipeline, StableDiffusionPipeline, scheduler=scheduler)
                return size, image(made, size=size)
            made = StableDiffusionPipeline.from_pipe(pipeline, scheduler=scheduler, safety_checker=None)
            if kind == 1:  # a plain pipeline asks for no size: it gets the one that is set
                return 1.0, image(made)
            with pipeline.supernet.at(size):
                return size, image(made)

        with ThreadPoolExecutor(4) as pool:
            for size, found in pool.map(sample, range(24)):
                assert np.array_equal(found, expected[size])
    finally:
        sys.setswitchinterval(0.005)
    assert pipeline.size == 1.0


def test_a_size_that_another_thread_sets_waits_for_the_call(folder):
    pipeline = load(folder)
    expected = image(pipeline, size=1.0)
    started, threads = threading.Event(), []

    def interfere(pipe, step, timestep, tensors):
        if not threads:
            threads.append(threading.Thread(target=lambda: (started.set(), pipeline.set_size(0.6))))
            threads[0].start()
            started.wait()
        return tensors

    assert np.array_equal(image(pipeline, callback_on_step_end=interfere), expected)
    threads[0].join()
    assert pipeline.size == 0.6


@pytest.mark.parametrize("change", ["fuse", "data", "copy", "hook", "scheduler"])
def test_a_weight_that_changes_during_a_call_is_seen(folder, change):
    pipeline = load(folder)
    weights = [layer.weight for layer in pipeline.unet.modules() if isinstance(layer, torch.nn.Conv2d)]

    def halve():
        for weight in weights:
            if change == "copy":
                with torch.no_grad():
                    weight.mul_(0.5)
            else:
                weight.data *= 0.5  # as peft merges a LoRA

    def sample(used, options=None):
        counted = []

        def on_step_end(pipe, step, timestep, tensors):
            halve()
            return tensors

        class Halving(DDIMScheduler):
            def step(self, *args, **kwargs):
                halve()
                return super().step(*args, **kwargs)

        def hook(module, args, output):
            counted.append(module)
            if len(counted) == 1:
                halve()

        before = [weight.detach().clone() for weight in weights]
        handle, scheduler = None, pipeline.scheduler
        options = {"size": used}
        if change == "hook":
            handle = pipeline.unet.register_forward_hook(hook)
        elif change == "scheduler":
            pipeline.scheduler = Halving.from_config(pipeline.scheduler.config)
        else:
            options["callback_on_step_end"] = on_step_end
        try:
            return image(pipeline, num_inference_steps=3, **options)
        finally:
            pipeline.scheduler = scheduler
            if handle is not None:
                handle.remove()
            with torch.no_grad():
                for weight, was in zip(weights, before, strict=True):
                    weight.copy_(was)

    found = sample(0.6)
    with warnings.catch_warnings():
        # The same with weights cut at every forward.
        pipeline._weights_stay = lambda args, kwargs: False
        expected = sample(0.6)
    assert np.array_equal(found, expected)
    assert not np.allclose(found, image(pipeline, size=0.6, num_inference_steps=3), atol=1e-4)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_fused_projections_are_refused_on_a_supernet_and_right_on_what_is_extracted(model):
    unet = make_unet(model)
    supernet = make_supernet(unet)
    inputs = random_inputs(unet)
    before = output(unet, inputs)
    with pytest.raises(ValueError, match="fused projections cannot follow the sizes"):
        unet.fuse_qkv_projections()
    assert torch.equal(output(unet, inputs), before)
    small = supernet.extract("smallest")
    expected = output(small, inputs)
    small.fuse_qkv_projections()
    assert relative_error(output(small, inputs), expected) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "FluxTransformer2DModel"])
def test_one_attention_that_is_fused_by_itself_is_noticed(name, tmp_path):
    model = make_unet(name) if name == "sd15" else tiny(name)
    inputs = random_inputs(model) if name == "sd15" else tiny_inputs(name)
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    table = allocate(model, groups, scores, (0.6, 1.0), budget="channels", inputs=inputs)
    supernet = Supernet(model, groups, scores, table)
    group = next(group for group in groups if group.kind == "self_attention")
    model.get_submodule(group.block).fuse_projections()
    for use in (
        lambda: output(model, inputs),
        lambda: supernet.extract(0.6),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match=f"the projections of {re.escape(group.name)} are fused"):
            use()
    assert not (tmp_path / "saved").exists()


def test_fusing_through_a_pipeline_is_refused(folder, tmp_path):
    pipeline = load(folder)
    with pytest.raises(ValueError, match="fused projections cannot follow the sizes"):
        pipeline.fuse_qkv_projections()
    pipeline.save_pretrained(tmp_path / "saved")
    assert OFAPipeline.from_pretrained(tmp_path / "saved", size=0.6).size == 0.6


def test_an_extracted_pipeline_saves_a_variant(folder, tmp_path):
    small = load(folder).extract(0.6)
    small.save_pretrained(tmp_path / "small", variant="fp16")
    names = {path.name for path in (tmp_path / "small" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small", variant="fp16", safety_checker=None)
    assert np.array_equal(image(loaded), image(small))
    assert json.loads((tmp_path / "small" / "model_index.json").read_text())["unet"][0] == "ofadiff"

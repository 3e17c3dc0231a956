"""Image-to-image, inpainting and ControlNet pipelines of Stable Diffusion 1.x and XL, at every size."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import make_supernet, output, random_inputs
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import MASK, PICTURE, SIZES, image, load, make_checkpoint
from tiny_stable_diffusion import make_unet, save_stable_diffusion, save_stable_diffusion_xl

from ofadiff import OFAPipeline

pytestmark = pytest.mark.slow

SAVE = {"sd": save_stable_diffusion, "sdxl": save_stable_diffusion_xl}
# For every task what chooses its pipeline class, and what a call needs.
TASKS = {
    "img2img": (AutoPipelineForImage2Image, {"image": PICTURE, "strength": 0.9}),
    "inpainting": (AutoPipelineForInpainting, {"image": PICTURE, "mask_image": MASK, "strength": 0.9}),
    "controlnet": (AutoPipelineForText2Image, {"image": PICTURE}),
    "controlnet img2img": (
        AutoPipelineForImage2Image,
        {"image": PICTURE, "control_image": PICTURE, "strength": 0.9},
    ),
}


@pytest.fixture(scope="module", params=SAVE)
def folder(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", SAVE[request.param])


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sd") / "checkpoint")


def make_controlnet(unet):
    """A ControlNet of the UNet's encoder whose outputs, zero when it is made, have an effect."""
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)).eval()
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.5)
    return controlnet


@pytest.mark.parametrize("task", TASKS)
def test_every_task_at_every_size_equals_the_stock_pipeline_around_the_extracted_model(folder, task):
    auto, inputs = TASKS[task]
    pipeline = load(folder)
    parts = {"controlnet": make_controlnet(pipeline.unet)} if "controlnet" in task else {}
    made = OFAPipeline.from_pipe(pipeline, auto, **parts)
    images = {}
    for size in SIZES:
        stock = auto.from_pipe(pipeline.extract(size), **parts)
        assert type(made)._stock_class is type(stock)
        images[size] = image(made, size=size, **inputs)
        assert np.allclose(images[size], image(stock, **inputs), atol=1e-5)
    assert np.abs(images[0.6] - images[1.0]).max() > 1e-3
    assert made.size == pipeline.size == 1.0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        image(made, size=0.6, callback_on_step_end_tensor_inputs=["no such tensor"], **inputs)
    assert made.size == 1.0


def test_pipelines_of_two_tasks_share_everything(sd_folder):
    pipeline = load(sd_folder)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    made = OFAPipeline.from_pipe(pipeline, StableDiffusionImg2ImgPipeline, scheduler=scheduler)
    assert isinstance(made, OFAPipeline) and isinstance(made, StableDiffusionImg2ImgPipeline)
    shared = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    assert all(made.components[name] is part for name, part in shared.items())
    assert made.scheduler is scheduler and pipeline.scheduler is not scheduler
    assert made.config.requires_safety_checker is False
    made.set_size(0.6)
    assert pipeline.size == 0.6
    # The one size that was loaded alone is shared too, though its class is not the one that diffusers names.
    one = load(sd_folder, size=0.6)
    assert OFAPipeline.from_pipe(one, StableDiffusionInpaintPipeline).unet is one.unet


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
def test_dtypes_stay_unless_asked_for(sd_folder):
    pipeline = load(sd_folder, dtype=torch.bfloat16)
    pipeline.vae.to(torch.float32)
    made = OFAPipeline.from_pipe(pipeline, StableDiffusionImg2ImgPipeline)
    assert made.unet.dtype == made.text_encoder.dtype == torch.bfloat16 and made.vae.dtype == torch.float32
    for name, dtype in (("dtype", torch.float32), ("torch_dtype", torch.float16)):
        made = OFAPipeline.from_pipe(pipeline, AutoPipelineForImage2Image, **{name: dtype})
        assert made.unet.dtype == made.vae.dtype == pipeline.unet.dtype == dtype


@pytest.mark.parametrize("pipeline_class", [StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image])
def test_diffusers_own_from_pipe_samples_at_the_size_that_is_set(sd_folder, pipeline_class):
    pipeline = load(sd_folder)
    pipeline.set_size(0.6)
    plain = pipeline_class.from_pipe(pipeline)
    assert type(plain) is StableDiffusionImg2ImgPipeline and plain.unet is pipeline.unet
    _, inputs = TASKS["img2img"]
    expected = image(OFAPipeline.from_pipe(pipeline, StableDiffusionImg2ImgPipeline), size=0.6, **inputs)
    assert np.array_equal(image(plain, **inputs), expected)
    with pytest.raises(ValueError, match="this StableDiffusionImg2ImgPipeline has no sizes"):
        OFAPipeline.from_pipe(plain, StableDiffusionPipeline)


def test_from_pipe_says_what_it_needs(sd_folder):
    pipeline = load(sd_folder)
    with pytest.raises(TypeError, match="'controlnet'"):
        OFAPipeline.from_pipe(pipeline, StableDiffusionControlNetPipeline)
    for wrong in ("img2img", UNet2DConditionModel, type(pipeline)):
        with pytest.raises(ValueError, match="it must be a diffusers pipeline class"):
            OFAPipeline.from_pipe(pipeline, wrong)
    with pytest.raises(ValueError, match="unet cannot be passed"):
        OFAPipeline.from_pipe(pipeline, StableDiffusionImg2ImgPipeline, unet=make_unet())


def test_an_inpainting_checkpoint_of_nine_channels(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", in_channels=9)
    StableDiffusionInpaintPipeline(
        **StableDiffusionPipeline.from_pretrained(folder).components, requires_safety_checker=False
    ).save_config(folder)
    pipeline = load(folder)
    assert isinstance(pipeline, StableDiffusionInpaintPipeline)
    _, inputs = TASKS["inpainting"]
    small = image(pipeline, size=0.6, **inputs)
    assert np.allclose(image(pipeline.extract(0.6), **inputs), small, atol=1e-5)


def test_saving_keeps_the_task(sd_folder, tmp_path):
    pipeline = load(sd_folder)
    parts = {"controlnet": make_controlnet(pipeline.unet)}
    made = OFAPipeline.from_pipe(pipeline, StableDiffusionControlNetPipeline, **parts)
    made.save_pretrained(tmp_path / "controlnet")
    again = load(tmp_path / "controlnet", size=0.6)
    assert isinstance(again, StableDiffusionControlNetPipeline)
    assert np.allclose(image(again, image=PICTURE), image(made, image=PICTURE, size=0.6), atol=1e-5)


def test_a_controlnet_made_of_the_supernet_is_the_originals_whatever_size_is_set(tmp_path):
    torch.manual_seed(0)
    unet = make_unet()
    expected = make_controlnet(unet)
    supernet = make_supernet(unet, sizes=SIZES)
    supernet.set_size(0.6)
    inputs = {**random_inputs(unet), "controlnet_cond": torch.rand(2, 3, 16, 16)}
    with torch.no_grad():
        for value, original in zip(make_controlnet(unet)(**inputs)[0], expected(**inputs)[0], strict=True):
            assert torch.allclose(value, original, atol=1e-5)
    # It would need the full encoder: diffusers refuses to copy the cut one.
    with pytest.raises(RuntimeError, match="size mismatch"):
        ControlNetModel.from_unet(supernet.extract(0.6))


def test_a_callback_may_change_the_size_from_step_to_step(sd_folder):
    pipeline = load(sd_folder)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda *_: seen.append(pipeline.size))

    def shrink(called, step, timestep, tensors):
        assert called is pipeline
        called.set_size("smallest")
        return tensors

    image(pipeline, size="largest", callback_on_step_end=shrink)
    assert seen == [1.0, 0.6] and pipeline.size == 1.0
    image(pipeline, callback_on_step_end=shrink)  # no size for this call: what the callback sets stays set
    assert seen == [1.0, 0.6, 1.0, 0.6] and pipeline.size == 0.6

    def fail(called, step, timestep, tensors):
        called.set_size("largest")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        image(pipeline, size=1.0, callback_on_step_end=fail)
    assert pipeline.size == 0.6


def test_offloading_to_the_cpu(sd_folder, tmp_path):
    pipeline = load(sd_folder)
    images = [image(pipeline, size=size) for size in SIZES]
    pipeline.enable_model_cpu_offload(device="cpu")
    assert all(np.array_equal(image(pipeline, size=size), was) for size, was in zip(SIZES, images, strict=True))
    assert pipeline.extract(0.6).unet.config.ofa_widths == pipeline.subnets.find(0.6).widths
    pipeline.remove_all_hooks()
    # What enable_sequential_cpu_offload does to a UNet: every layer's weights are there during its forward only.
    cpu_offload(pipeline.unet, "cpu")
    assert all(np.array_equal(image(pipeline, size=size), was) for size, was in zip(SIZES, images, strict=True))
    with pytest.raises(ValueError, match="the model's weights are offloaded"):
        pipeline.extract(0.6)
    for save in (pipeline.save_pretrained, pipeline.supernet.save_pretrained):
        with pytest.raises(ValueError, match="the model's weights are offloaded"):
            save(tmp_path / "offloaded")
        assert not (tmp_path / "offloaded").exists()
    pipeline.remove_all_hooks()
    assert all(np.array_equal(image(pipeline, size=size), was) for size, was in zip(SIZES, images, strict=True))


def test_loras_of_pipelines_that_share_the_supernet(sd_folder):
    torch.manual_seed(0)
    adapted = make_unet()
    targets = ["to_q", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj"]
    adapted.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    lora = {f"unet.{key}": value for key, value in get_peft_model_state_dict(adapted).items()}
    pipeline = load(sd_folder)
    made = OFAPipeline.from_pipe(pipeline, StableDiffusionImg2ImgPipeline)
    inputs = random_inputs(pipeline.unet)

    def predictions():
        found = []
        for size in SIZES:
            with pipeline.supernet.at(size) as unet:
                found.append(output(unet, inputs))
        return torch.stack(found)

    def same(found, expected):
        return torch.allclose(found, expected, atol=1e-5)

    before = predictions()
    made.load_lora_weights(lora, adapter_name="style")
    with_style = predictions()
    assert not same(with_style, before)
    # Fused at any size, it is fused in the weights of all.
    for size in SIZES:
        made.set_size(size)
        made.fuse_lora()
        assert same(predictions(), with_style)
        made.unfuse_lora()
        assert same(predictions(), with_style)
    pipeline.set_adapters("style", 0.0)
    assert same(predictions(), before)
    pipeline.set_adapters("style", 1.0)
    assert same(predictions(), with_style)
    pipeline.disable_lora()
    assert same(predictions(), before)
    pipeline.enable_lora()
    made.delete_adapters("style")
    assert same(predictions(), before)
    made.load_lora_weights(lora, adapter_name="style")
    pipeline.unload_lora_weights()
    assert same(predictions(), before)


# Pickled is how it reaches another process.
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
def test_a_copy_stands_alone(sd_folder, duplicate):
    pipeline = load(sd_folder)
    again = duplicate(pipeline)
    assert type(again) is type(pipeline) and again.unet is not pipeline.unet
    assert np.array_equal(image(again, size=0.6), image(pipeline, size=0.6))
    again.set_size(0.6)
    assert pipeline.size == 1.0 and torch.equal(
        output(again.unet, random_inputs(again.unet)), output(pipeline.extract(0.6).unet, random_inputs(again.unet))
    )

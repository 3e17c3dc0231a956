"""A LoRA that was made for the original model, at every size and in extracted pipelines."""

import pytest
import torch
from conftest import make_dropping_supernet, make_supernet, make_unet, output, random_inputs, relative_error, sliced
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_stable_diffusion import save_stable_diffusion

from ofadiff import OFAPipeline

pytestmark = pytest.mark.slow

SIZES = (0.5, 0.75, 1.0)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]


@pytest.fixture(params=["rotated", "sorted", "dropped"])
def parts(request, tmp_path):
    """An OFA checkpoint, the state dict of a LoRA trained on the original, and the original with that LoRA fused."""
    adapted = make_unet("sd15")
    adapted.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    lora = {f"unet.{key}": value.clone() for key, value in get_peft_model_state_dict(adapted).items()}
    lora_metadata = {f"unet.{key}": value for key, value in adapted.peft_config["default"].to_dict().items()}
    adapted.fuse_lora()
    adapted.unload_lora()

    unet = make_unet("sd15")
    if request.param == "dropped":
        supernet = make_dropping_supernet(unet, SIZES)
    else:
        supernet = make_supernet(unet, SIZES, rotate=request.param == "rotated")
    save_stable_diffusion(tmp_path / "checkpoint")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "checkpoint", safety_checker=None)
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    pipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers={k.removeprefix("unet."): v for k, v in lora.items()},
        unet_lora_adapter_metadata={k.removeprefix("unet."): v for k, v in lora_metadata.items()},
    )  # fmt: skip
    return tmp_path / "checkpoint", tmp_path / "lora", adapted.eval()


def test_it_acts_as_the_sliced_fused_original(parts):
    checkpoint, lora, fused = parts
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    inputs = random_inputs(fused)
    without = output(pipeline.unet, inputs)
    pipeline.load_lora_weights(lora, weight_name=LORA)
    assert relative_error(output(pipeline.unet, inputs), output(fused, inputs)) < 1e-4
    assert relative_error(without, output(fused, inputs)) > 1e-2
    reference = sliced(fused, checkpoint / "unet")
    for size in SIZES:
        pipeline.set_size(size)
        reference.set_size(size)
        assert relative_error(output(pipeline.unet, inputs), output(reference.model, inputs)) < 1e-4
    pipeline.unload_lora_weights()
    pipeline.set_size(1.0)
    assert torch.equal(output(pipeline.unet, inputs), without)


def test_an_extracted_pipeline_takes_it_too(parts, tmp_path):
    checkpoint, lora, fused = parts
    reference = sliced(fused, checkpoint / "unet")
    inputs = random_inputs(fused)
    supernet = OFAPipeline.from_pretrained(checkpoint)
    for size in SIZES:
        supernet.extract(size).save_pretrained(tmp_path / f"{size}")
        reference.set_size(size)
        for pipeline in (
            DiffusionPipeline.from_pretrained(tmp_path / f"{size}", safety_checker=None),
            OFAPipeline.from_pretrained(checkpoint, size=size, safety_checker=None),
        ):
            pipeline.load_lora_weights(lora, weight_name=LORA)
            assert relative_error(output(pipeline.unet, inputs), output(reference.model, inputs)) < 1e-4


def test_fusing_it_before_extracting_keeps_it(parts):
    checkpoint, lora, fused = parts
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(lora, weight_name=LORA)
    with pytest.raises(ValueError, match="the model has adapters; fuse_lora"):
        pipeline.extract(0.5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    reference = sliced(fused, checkpoint / "unet")
    inputs = random_inputs(fused)
    with reference.at(0.5) as unet:
        assert relative_error(output(pipeline.extract(0.5).unet, inputs), output(unet, inputs)) < 1e-4


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_with_their_own_weights(parts):
    checkpoint, lora, fused = parts
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    inputs = random_inputs(fused)
    pipeline.load_lora_weights(lora, weight_name=LORA, adapter_name="first")
    once = output(pipeline.unet, inputs)
    pipeline.load_lora_weights(lora, weight_name=LORA, adapter_name="second")
    pipeline.set_adapters(["first", "second"], [0.5, 0.5])
    assert relative_error(output(pipeline.unet, inputs), once) < 1e-4
    pipeline.set_size(0.5)
    small = output(pipeline.unet, inputs)
    pipeline.delete_adapters("second")
    pipeline.set_adapters("first")
    assert relative_error(output(pipeline.unet, inputs), small) < 1e-4


def test_what_cannot_follow_the_sizes_is_refused(parts):
    checkpoint, _, _ = parts
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="an IP-Adapter works with the original model only"):
        pipeline.load_ip_adapter("somewhere")
    pipeline.unet.add_adapter(LoraConfig(r=3, target_modules=["to_q"], use_dora=True), "dora")
    with pytest.raises(ValueError, match="uses DoRA at down_blocks"):
        pipeline.supernet.adopt_adapter("dora")

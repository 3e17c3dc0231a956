"""Weights and answers that are not finite are named before anything is made of them."""

import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from recipes.tiny_text_to_image import save_pipeline
from torch import nn

import ofadiff
from ofadiff.commands.extract import Extraction, extract
from ofadiff.denoisers.original import read_original
from ofadiff.recordings import Recordings
from ofadiff.storage.finite import NotFiniteError, check_finite_weights


def save_ddpm(folder, spoil=lambda unet: None):
    unet = plain_unet()
    with torch.no_grad():
        spoil(unet)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return unet


def test_an_original_is_refused_with_the_model_and_the_weight(tmp_path):
    def spoil(unet):
        unet.mid_block.attentions[0].to_q.bias[1] = float("-inf")

    save_ddpm(tmp_path / "ddpm", spoil)
    with pytest.raises(ValueError, match=r"the unet of .*ddpm has .* not finite: 1 of the 64 in mid_block.*to_q\.bias"):
        read_original(str(tmp_path / "ddpm")).load()
    save_pipeline("sd3", tmp_path / "sd3")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "sd3")
    next(pipeline.text_encoder.parameters()).data[:2] = float("nan")
    pipeline.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match=r"the text_encoder of .*sd3 has weights that are not finite"):
        read_original(str(tmp_path / "sd3")).load()


def test_a_size_that_float16_cannot_hold_is_not_written(tmp_path):
    unet = save_ddpm(tmp_path / "ofa", lambda unet: unet.conv_in.weight.fill_(1e5))
    make_supernet(unet, sizes=(0.5, 1.0)).save_pretrained(tmp_path / "ofa" / "unet")
    asked = {"checkpoint": str(tmp_path / "ofa"), "sizes": (0.5,)}
    with pytest.raises(ValueError, match=r"size 0\.5 in float16 .* in conv_in\.weight; .* float16 up to 65504"):
        extract(extraction=Extraction(**asked, output_dir=str(tmp_path / "half"), dtype="float16"))
    assert not (tmp_path / "half").exists()
    extract(extraction=Extraction(**asked, output_dir=str(tmp_path / "brain"), dtype="bfloat16"))
    assert (tmp_path / "brain" / "size-0.5").is_dir()


def test_weights_of_one_byte_are_looked_at_and_whole_numbers_pass():
    layer = nn.Linear(4, 2)
    layer.register_buffer("steps", torch.zeros(2, dtype=torch.long))
    check_finite_weights(layer, "it")
    layer.weight.data[0, 0] = float("nan")
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="1 of the 8 in weight; expected numbers, of float8_e4m3fn up to 448"):
        check_finite_weights(layer, "it")


@pytest.mark.parametrize("first_bad", [0, 2])
def test_answers_that_are_not_finite_are_not_recorded(tmp_path, first_bad):
    save_ddpm(tmp_path / "ddpm")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "ddpm")
    calls = 0

    def overflow(module, args, output):
        nonlocal calls
        calls += 1
        output.sample.mul_(1 if calls <= 3 + first_bad else float("inf"))

    pipeline.unet.register_forward_hook(overflow)
    options = {"steps_per_call": 1, "progress": False}
    with pytest.raises(NotFiniteError, match=f"call 2: the UNet2DModel .* step {first_bad}, in torch.float32"):
        ofadiff.record(pipeline, [{"num_inference_steps": 3}] * 2, tmp_path / "recordings", **options)
    assert list(Recordings(tmp_path / "recordings").pipeline_calls) == [0]

"""Models stored in half precision train, are drawn from, and come out as they were stored."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from recipes.test_compress_dit import arguments, files  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import save_captioned_images, save_stable_diffusion

from ofadiff import OFAPipeline

pytestmark = pytest.mark.slow

# Components in half precision; the others are stored in float32.
STORED = {
    "all": ("unet", "vae", "text_encoder"),
    "text encoder": ("text_encoder",),
    "vae": ("vae",),
}


def half_stored(folder, parts, dtype=torch.float16, **options):
    save_stable_diffusion(folder / "original")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "original", safety_checker=None)
    for name in parts:
        torch.nn.Module.to(pipeline.components[name], dtype)
    pipeline.save_pretrained(folder / "half", **options)
    save_captioned_images(folder / "images")
    return folder / "half"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def dit_run(arguments, recipe):  # noqa: F811
    return lambda **options: recipe("compress_dit.py", arguments(**options))


@pytest.fixture
def run(words, recipe, tmp_path):
    def run(folder, **options):
        settings = {
            "pretrained_model_name_or_path": folder,
            "train_data_dir": tmp_path / "images",
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "out",
            "sizes": "0.6 1.0",
            "resolution": 16,
            "max_train_steps": 1,
            "train_batch_size": 2,
            "importance_samples": 2,
            "correction_samples": 2,
            "validation_samples": 2,
            "lr_warmup_steps": 0,
            "validation_inference_steps": 1,
        }
        return recipe("compress_sd.py", words(settings | options))

    return run


@pytest.mark.parametrize("stored", STORED)
def test_stable_diffusion(run, tmp_path, stored):
    folder = half_stored(tmp_path, STORED[stored])
    run(folder, validation_prompts=["a red house"])
    out = tmp_path / "out"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert contents(out / part) == contents(folder / part), part
    pipeline = OFAPipeline.from_pretrained(out, safety_checker=None)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    for loaded in (pipeline, OFAPipeline.from_pretrained(out, size=0.6, safety_checker=None)):
        image = loaded("a red house", size=0.6, num_inference_steps=1, output_type="np").images
        assert np.isfinite(image).all()
    mine = torch.nn.Module.to(pipeline.text_encoder, torch.bfloat16)  # what is given stays what it is
    given = OFAPipeline.from_pretrained(out, safety_checker=None, text_encoder=mine)
    assert given.text_encoder is mine and mine.dtype is torch.bfloat16
    plain = DiffusionPipeline.from_pretrained(out, safety_checker=None, dtype=torch.float32)
    assert type(plain) is StableDiffusionPipeline


def test_a_variant_and_mixed_precision(run, tmp_path):
    folder = half_stored(tmp_path, STORED["all"], torch.bfloat16, variant="bf16")
    run(folder, variant="bf16", mixed_precision="bf16", validation_prompts=["a"])
    out = tmp_path / "out"
    names = {path.name for path in (out / "vae").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    saved = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    original = load_file(folder / "vae" / "diffusion_pytorch_model.bf16.safetensors")
    assert all(value.dtype is torch.bfloat16 and torch.equal(value, original[name]) for name, value in saved.items())
    text = load_file(out / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in text.values()} == {torch.bfloat16}


def test_weights_that_are_a_pickle_but_for_a_variant_are_refused(run, tmp_path):
    folder = half_stored(tmp_path, ())
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    original = load_file(weights)
    AutoencoderKL.from_pretrained(folder / "vae").save_pretrained(folder / "vae", safe_serialization=False)
    save_file({name: value.half() for name, value in original.items()}, weights.with_suffix(".fp16.safetensors"))
    weights.unlink()
    assert weights.with_suffix(".bin").is_file()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is not opened.*is its variant meant"):
        run(folder)
    assert not (tmp_path / "out").exists()


def test_dit_keeps_its_vae_as_it_was_stored(files, dit_run, tmp_path):  # noqa: F811
    pipeline = DiffusionPipeline.from_pretrained(files / "latents")
    torch.nn.Module.to(pipeline.vae, torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    dit_run(pretrained_model_name_or_path=tmp_path / "half", num_validation_images=1, validation_inference_steps=1)
    assert contents(tmp_path / "out" / "vae") == contents(tmp_path / "half" / "vae")
    made = OFAPipeline.from_pretrained(tmp_path / "out")
    made.set_progress_bar_config(disable=True)
    assert len(made(class_labels=[0], size=0.7, num_inference_steps=1, guidance_scale=1.0).images) == 1

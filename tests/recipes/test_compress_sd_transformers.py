import json
import shutil

import pytest
import torch
from conftest import sliced
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from recipes.tiny_stable_diffusion import save_captioned_images
from recipes.tiny_text_to_image import PIPELINES, save_pipeline

from ofadiff import OFAPipeline, Supernet
from ofadiff.denoisers import original as originals
from ofadiff.denoisers.encoder import Encoder
from ofadiff.denoisers.original import Original

# Sana's scheduler computes with numpy as it was.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every text-to-image transformer in small, and captioned images."""
    folder = tmp_path_factory.mktemp("files")
    for name in PIPELINES:
        save_pipeline(name, folder / name)
    save_captioned_images(folder / "images")
    return folder


@pytest.fixture
def run(files, tmp_path, words, recipe):
    """Compresses one of the pipelines; options are flags without their dashes."""

    def run(model, **options):
        settings = {
            "pretrained_model_name_or_path": files / model,
            "train_data_dir": files / "images",
            "cache_dir": files / "cache",
            "output_dir": tmp_path / "out",
            "resolution": 32,
            "sizes": "0.7 1.0",
            "max_train_steps": 2,
            "train_batch_size": 2,
            "importance_samples": 2,
            "correction_samples": 2,
            "validation_samples": 2,
            "validation_fraction": 0.2,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 1,
        }
        return recipe("compress_sd.py", words(settings | options))

    return run


def absent_components(folder):
    return originals.absent_components(DiffusionPipeline.load_config(folder))


def sample(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    options |= {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}
    return pipeline("a b", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("model", PIPELINES)
def test_the_result_is_the_original_pipeline_with_every_size(run, files, tmp_path, model):
    result = run(
        model,
        correction_samples=0,
        feature_distill_weight=0.1,
        gradient_checkpointing=True,
        validation_prompts=["a red house"],
        validation_inference_steps=1,
    )
    # The largest size starts as the teacher, as nothing is fitted before: the same noise, the same target, whatever the
    # model predicts.
    assert result.history[0][1.0] == pytest.approx(result.teacher_loss, rel=1e-4)
    out = tmp_path / "out"
    assert (out / "samples" / "000002.png").is_file()

    absent = absent_components(files / model)
    assert absent_components(out) == absent
    original, plain = (DiffusionPipeline.from_pretrained(folder, **absent) for folder in (files / model, out))
    assert type(plain) is type(original) and type(plain.transformer) is type(original.transformer)
    assert plain.scheduler.config == original.scheduler.config
    pipeline = OFAPipeline.from_pretrained(out, **absent)
    options = Encoder(original).kind.call_options
    torch.testing.assert_close(sample(pipeline, **options), sample(plain, **options))
    small = sample(pipeline, size=0.7, **options)
    torch.testing.assert_close(sample(pipeline.extract(0.7), **options), small)
    torch.testing.assert_close(sample(OFAPipeline.from_pretrained(out, size=0.7, **absent), **options), small)


def test_a_killed_run_resumes_to_the_same_weights(run, tmp_path):
    options = {"center_crop": True, "random_flip": True, "cache_dir_latents": tmp_path / "latents"}
    run("sana", output_dir=tmp_path / "whole", **options)
    run("sana", **options)
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / name)
    run("sana", resume_from_checkpoint="latest", **options)
    whole, resumed = (Supernet.from_pretrained(tmp_path / name / "transformer").model for name in ("whole", "out"))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


# PyTorch says that its fused RMS norm is not for autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("model", ["flux", "sana"])
def test_half_precision_begins_and_ends_with_the_original(run, model, tmp_path):
    watched = {"validation_prompts": ["a"], "validation_inference_steps": 1}
    result = run(model, mixed_precision="bf16", max_train_steps=1, correction_samples=0, **watched)
    assert result.history[0][1.0] == pytest.approx(result.teacher_loss, rel=0.01)
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("flux", {"resolution": 34}, "--resolution 34 is not a multiple of 4, as this model needs"),
        ("sd3", {"resolution": 68}, "--resolution 68 is more than 64, this model's largest"),
        ("sd3", {"snr_gamma": 5}, "--snr_gamma .* FlowMatchEulerDiscreteScheduler is one of flow"),
        (
            "sana",
            {"noise_offset": 0.1},
            "--noise_offset .* DPMSolverMultistepScheduler is one of flow",
        ),
        ("flux", {"sizes": "0.1 1.0"}, "the smallest subnet has"),
    ],
)
def test_what_cannot_work_is_said_before_any_model_is_loaded(run, tmp_path, monkeypatch, model, options, message):
    monkeypatch.setattr(Original, "load", None)
    with pytest.raises(ValueError, match=message):
        run(model, **options)
    assert not (tmp_path / "out").exists()


def test_other_autoencoders_and_channels_are_refused(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Original, "load", None)
    for name in ("video", "other"):
        shutil.copytree(files / "flux", tmp_path / name)
    config = tmp_path / "video" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderKLWan"}))
    shape = AutoencoderKL.load_config(files / "flux" / "vae")
    AutoencoderKL.from_config({**shape, "latent_channels": 8}).save_pretrained(tmp_path / "other" / "vae")
    for name, message in {
        "video": "its VAE is an AutoencoderKLWan, not an AutoencoderKL or Auto",
        "other": "has 16 input and 16 output channels, its VAE 8; .* have 32 channels",
    }.items():
        with pytest.raises(ValueError, match=message):
            run("flux", pretrained_model_name_or_path=tmp_path / name)


def test_a_lora_of_the_original_acts_as_the_sliced_fused_original(run, files, tmp_path):
    run("sd3", max_train_steps=0, correction_samples=0)
    original = DiffusionPipeline.from_pretrained(files / "sd3")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]
    original.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    layers = get_peft_model_state_dict(original.transformer)
    original.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    original.fuse_lora()
    original.unload_lora_weights()

    pipeline = OFAPipeline.from_pretrained(tmp_path / "out")
    without = sample(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=LORA)
    torch.testing.assert_close(sample(pipeline), sample(original), atol=1e-4, rtol=1e-3)
    assert (sample(pipeline) - without).abs().max() > 1e-2
    expected = DiffusionPipeline.from_pretrained(files / "sd3", transformer=None)
    reference = sliced(original.transformer, tmp_path / "out" / "transformer")
    reference.set_size(0.7)
    expected.transformer = reference.model
    torch.testing.assert_close(sample(pipeline, size=0.7), sample(expected), atol=1e-4, rtol=1e-3)

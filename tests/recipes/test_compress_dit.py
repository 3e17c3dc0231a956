import copy

import numpy as np
import pytest
import torch
from cyclopts import CycloptsError
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from tiny_stable_diffusion import make_vae

from ofadiff import OFAPipeline, Supernet
from ofadiff.commands.compress import make_supernet
from ofadiff.denoisers.dit import drop_labels, keep_labels
from ofadiff.runs import Compression, Data, Model, Output, RunSettings, save, start
from ofadiff.training.bundles import TrainingResult

pytestmark = pytest.mark.slow

CLASSES = 3


def make_transformer(**changes):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": CLASSES,
    }
    return DiTTransformer2DModel(**{**config, **changes}).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A DiT of latents with a learned variance, one of pixels, and images of three classes."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False)
    names = {index: f"class {index}" for index in range(CLASSES)}
    DiTPipeline(make_transformer(out_channels=8), make_vae(), scheduler, names).save_pretrained(folder / "latents")
    DDPMPipeline(make_transformer(in_channels=1), scheduler).save_pretrained(folder / "pixels")
    noise = np.random.default_rng(0)
    for index in range(12):
        path = folder / "images" / str(index % CLASSES) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (18, 16), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def arguments(files, tmp_path, words):
    """Makes a command line; options are flags without their dashes, None leaves one out."""

    def arguments(**options):
        settings = {
            "pretrained_model_name_or_path": files / "latents",
            "train_data_dir": files / "images",
            "output_dir": tmp_path / "out",
            "sizes": "0.7 1.0",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "importance_samples": 8,
            "correction_samples": 8,
            "validation_samples": 8,
            "num_validation_images": 0,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 2,
            "feature_distill_weight": 0.1,
        }
        return words(settings | options)

    return arguments


@pytest.fixture
def run(arguments, recipe):
    return lambda **options: recipe("compress_dit.py", arguments(**options))


@pytest.mark.parametrize(("original", "denoiser"), [("latents", "transformer"), ("pixels", "unet")])
def test_the_result_is_a_pipeline_with_every_size(run, files, tmp_path, original, denoiser):
    options = {"num_validation_images": 2, "validation_inference_steps": 2}
    result = run(pretrained_model_name_or_path=files / original, **options)
    assert set(result.history) == {0, 3}
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(files / original)
    assert type(plain) is type(stock) and type(plain.components[denoiser]) is DiTTransformer2DModel
    if original == "latents":
        assert plain.labels == stock.labels
        for name, weight in stock.vae.state_dict().items():
            assert torch.equal(plain.vae.state_dict()[name], weight)
    pipeline = OFAPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [0, 2], "num_inference_steps": 2, "output_type": "np"}
    call |= {"guidance_scale": 1.0} if original == "latents" else {}
    images = pipeline(size=0.7, generator=torch.Generator().manual_seed(0), **call).images
    alone = OFAPipeline.from_pretrained(tmp_path / "out", size=0.7)
    alone.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images, alone(generator=torch.Generator().manual_seed(0), **call).images, atol=1e-5)


def test_a_run_resumes_exactly(run, tmp_path):
    run(output_dir=tmp_path / "whole")
    run()
    (tmp_path / "out" / "model_index.json").unlink()
    run(resume_from_checkpoint="latest")
    whole, resumed = (
        Supernet.from_pretrained(tmp_path / name / "transformer").model.state_dict() for name in ("whole", "out")
    )
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_the_model_that_training_leaves_is_saved(files, tmp_path):
    run = start(
        RunSettings(
            Model(pretrained_model_name_or_path=str(files / "latents")),
            Data(train_data_dir=str(files / "images")),
            Output(output_dir=str(tmp_path / "out")),
            compression=Compression(sizes=(0.7, 1.0), importance_samples=8, correction_samples=8),
        )
    )
    supernet = make_supernet(run)
    whole = copy.deepcopy(supernet)
    supernet.model.to("meta")  # as one that FSDP has split: not to be saved
    vars(supernet).update(vars(whole))
    save(run, supernet, TrainingResult(0, 0.0, {}, None))
    saved = Supernet.from_pretrained(tmp_path / "out" / "transformer").model.state_dict()
    expected = supernet.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in saved.items())


def test_labels_are_left_out_for_the_whole_model_at_once():
    labels, seeds = torch.arange(1000) % CLASSES, torch.arange(1000)
    dropped = drop_labels(labels, seeds, CLASSES, 0.1)
    assert torch.equal(dropped, drop_labels(labels, seeds, CLASSES, 0.1))
    assert 60 < (dropped == CLASSES).sum() < 140
    assert torch.equal(dropped[dropped != CLASSES], labels[dropped != CLASSES])
    transformer = make_transformer().train()
    inputs = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    with torch.no_grad():
        assert not torch.equal(transformer(*inputs).sample, transformer(*inputs).sample)
        keep_labels(transformer)
        assert torch.equal(transformer(*inputs).sample, transformer(*inputs).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"sizes": "0.01 1.0"}, "smallest"),
        ({"class_dropout_prob": 1.5}, r"'1.5' is not a number in \[0, 1\]"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises((CycloptsError, ValueError), match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_other_pipelines_are_refused(run, files, tmp_path):
    run(max_train_steps=1)
    with pytest.raises(ValueError, match="is compressed already"):
        run(pretrained_model_name_or_path=tmp_path / "out", output_dir=tmp_path / "again")
    with pytest.raises(ValueError, match="it is the folder of a single AutoencoderKL"):
        run(pretrained_model_name_or_path=files / "latents" / "vae", output_dir=tmp_path / "again")

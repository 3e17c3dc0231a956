"""Checkpoints that earlier code has written are read as they were: the very first, and those before the move.

All of them are of format version 1, the only one so far. The first ones call their groups otherwise, do not say how
layers are cut, and nothing ties their files together. `written_before_the_move` is of the time before modules, settings
and commands got their places.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from diffusers import DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file

from ofadiff import OFAPipeline, Supernet
from ofadiff.commands import command
from ofadiff.commands.app import make_app

WRITTEN = Path(__file__).parent / "fixtures" / "written_before_the_move"
FIRST = Path(__file__).parent / "fixtures" / "written_first"

# What the run was asked for, whose checkpoint after two of three steps lies there.
ASKED = {
    "pretrained_model_name_or_path": "original",
    "train_data_dir": "images",
    "sizes": "0.5 1.0",
    "max_train_steps": 3,
    "train_batch_size": 2,
    "importance_samples": 8,
    "validation_samples": 8,
    "num_validation_images": 0,
    "lr_warmup_steps": 0,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,
}


@pytest.fixture
def outputs():
    """Inputs, and what the sizes made of them then."""
    return load_file(WRITTEN / "outputs.safetensors")


def call(denoiser, outputs):
    with torch.no_grad():
        return denoiser(outputs["sample"], outputs["timestep"], class_labels=outputs["class_labels"]).sample


def test_a_supernet_with_the_adapter_of_a_size(outputs):
    pipeline = OFAPipeline.from_pretrained(WRITTEN / "pipeline")
    assert pipeline.sizes == (0.5, 1.0) and list(pipeline.supernet.size_adapters) == [0.5]
    for size in pipeline.sizes:
        with pipeline.supernet.at(size) as denoiser:
            assert relative_error(call(denoiser, outputs), outputs[f"output at {size:g}"]) < 1e-5
    alone = OFAPipeline.from_pretrained(WRITTEN / "pipeline", size=0.5)
    assert relative_error(call(alone.unet, outputs), outputs["output at 0.5"]) < 1e-5


def test_the_very_first_supernet(tmp_path):
    outputs = load_file(FIRST / "outputs.safetensors")
    pipeline = OFAPipeline.from_pretrained(FIRST / "pipeline")
    pipeline.save_pretrained(tmp_path / "again")  # as it is written today
    again = OFAPipeline.from_pretrained(tmp_path / "again")
    assert pipeline.sizes == again.sizes == (0.6, 1.0)
    for size in pipeline.sizes:
        alone = OFAPipeline.from_pretrained(FIRST / "pipeline", size=size)
        assert relative_error(call(alone.unet, outputs), outputs[f"output at {size:g}"]) < 1e-5
        for supernet in (pipeline.supernet, again.supernet):
            with supernet.at(size) as denoiser:
                assert relative_error(call(denoiser, outputs), outputs[f"output at {size:g}"]) < 1e-5


def test_a_later_format_is_refused_in_one_sentence(tmp_path):
    shutil.copytree(WRITTEN / "pipeline", tmp_path / "later")
    config = tmp_path / "later" / "unet" / "ofa_config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"ofa_config\.json has format_version 2; this ofadiff reads 1$"):
        OFAPipeline.from_pretrained(tmp_path / "later")


def test_an_extracted_pipeline(outputs):
    pipeline = DiffusionPipeline.from_pretrained(WRITTEN / "extracted")
    assert type(pipeline) is DDPMPipeline
    assert relative_error(call(pipeline.unet, outputs), outputs["output at 0.5"]) < 1e-5


def test_a_run_goes_on_to_the_weights_that_it_had_then(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN / "run", tmp_path / "run")
    expected = load_file(tmp_path / "run" / "trained.safetensors")
    (tmp_path / "run" / "trained.safetensors").unlink()
    monkeypatch.chdir(WRITTEN)
    words = [word for name, value in ASKED.items() for word in (f"--{name}", *str(value).split())]
    resume = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"]
    assert command.call(make_app(), ["compress", *words, *resume]).steps == 3
    trained = Supernet.from_pretrained(tmp_path / "run" / "unet").model.state_dict()
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)
    wrong = [*words, *resume, "--learning_rate", "0.5"]
    del wrong[wrong.index("--learning_rate") : wrong.index("--learning_rate") + 2]
    shutil.rmtree(tmp_path / "run" / "unet")
    with pytest.raises(ValueError, match=r"its --learning_rate is 0\.001, not 0\.5; a resumed run is the same run"):
        command.call(make_app(), ["compress", *wrong])

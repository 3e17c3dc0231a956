import pytest
import torch
from conftest import make_supernet, output, plain_unet, random_inputs
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline

from ofadiff import OFAPipeline


@pytest.fixture
def checkpoint(tmp_path):
    unet = plain_unet()
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    return tmp_path / "checkpoint"


def test_every_size_becomes_a_pipeline_folder(launch, words, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = launch("extract.py", words({"checkpoint": checkpoint, "sizes": "0.5 largest", "output_dir": out}))
    assert done.returncode == 0, done.stderr
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    inputs = random_inputs(pipeline.unet)
    for size in (0.5, 1.0):
        small = DiffusionPipeline.from_pretrained(out / f"size-{size:g}")
        with pipeline.supernet.at(size) as unet:
            assert torch.equal(output(small.unet, inputs), output(unet, inputs))

    again = launch("extract.py", words({"checkpoint": checkpoint, "sizes": "0.5", "output_dir": out}))
    assert again.returncode == 2 and "size-0.5 exists already" in again.stderr


def test_bad_input(launch, words, checkpoint, tmp_path):
    for options, message in (
        ({"checkpoint": checkpoint, "sizes": "0.3"}, "size is 0.3; it must be one of 0.5, 1"),
        ({"checkpoint": tmp_path / "nowhere", "sizes": "0.5"}, "is no diffusers pipeline folder"),
    ):
        done = launch("extract.py", words({**options, "output_dir": tmp_path / "out"}))
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

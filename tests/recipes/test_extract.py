import pytest
from conftest import make_supernet, output, plain_unet, random_inputs, relative_error
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from recipes.conftest import load_recipe

from ofadiff import OFAPipeline
from ofadiff.adapters.size_adapter import SizeAdapter
from ofadiff.commands import command

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path):
    unet = plain_unet()
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    small = supernet.extract(0.5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False), small)
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(small))
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
            # The adapter of 0.5 is merged; every other weight is the checkpoint's own.
            assert relative_error(output(small.unet, inputs), output(unet, inputs)) <= (1e-5 if size == 0.5 else 0)
    assert done.stdout.splitlines()[0].endswith("its adapter merged") and done.stdout.count("merged") == 1


def test_bad_input(words, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "used" / "size-0.5").mkdir(parents=True)
    for options, message in (
        ({"checkpoint": checkpoint, "sizes": "0.3"}, "size is 0.3; it must be one of 0.5, 1"),
        ({"checkpoint": tmp_path / "nowhere", "sizes": "0.5"}, "is no diffusers pipeline folder"),
        ({"checkpoint": checkpoint, "sizes": "0.5", "output_dir": tmp_path / "used"}, "size-0.5 exists already"),
    ):
        monkeypatch.setattr("sys.argv", ["extract.py", *words({"output_dir": tmp_path / "out", **options})])
        with pytest.raises(SystemExit) as stop:
            command.main(load_recipe("extract.py"))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("extract.py: error: ") and message in error
        assert not (tmp_path / "out").exists()

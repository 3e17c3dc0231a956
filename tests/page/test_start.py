"""What can be wrong is said before the server starts."""

import json
import shutil
import socket
import sys

import pytest
from tiny_stable_diffusion import save_stable_diffusion

from ofadiff.commands.app import main


@pytest.fixture
def error(monkeypatch, capsys):
    """Runs `ofadiff app …`, which has to fail without a server, and returns what it says."""
    monkeypatch.setattr("ofadiff.commands.page.serve", None)

    def error(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["app", *map(str, words)])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("ofadiff: error: ")

    return error


def test_a_folder_that_is_no_checkpoint(error, tmp_path):
    assert "holds no model_index.json" in error(tmp_path)
    assert "holds no model_index.json" in error(tmp_path / "nowhere")
    save_stable_diffusion(tmp_path / "plain")
    assert "so it is no OFA checkpoint; `ofadiff compress` makes one" in error(tmp_path / "plain")


def test_an_original_that_is_none(error, text_to_image, tmp_path, checkpoint):
    assert "holds no model_index.json" in error(text_to_image, "--original", tmp_path)
    said = error(text_to_image, "--original", checkpoint / "teacher")
    assert said.startswith("the original is a ClassConditionalDDPMPipeline; it must be called as")


def test_an_address_that_cannot_be_had(error, text_to_image):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = error(text_to_image, "--port", port)
        assert said.startswith(f"nothing can listen at --host 127.0.0.1 --port {port}") and "another --port" in said
    assert error(text_to_image, "--host", "192.0.2.1").startswith("nothing can listen at --host 192.0.2.1")
    assert "'0' is not a whole number in [1, 65535]" in error(text_to_image, "--port", "0")
    assert "'http' is not a whole number" in error(text_to_image, "--port", "http")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:7", "meta"])
def test_a_device_that_is_not_there(error, text_to_image, device):
    said = error(text_to_image, "--device", device)
    assert said.startswith(f"--device {device} is not there; this machine has ") and "cpu" in said


def test_a_missing_gradio_is_said_first(error, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert error(tmp_path / "nowhere") == "the page is made with Gradio: pip install ofadiff[app]"


def test_a_pipeline_that_needs_more_than_the_page_asks_for(error, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert error(folder).startswith("the call of a StableDiffusionImg2ImgPipeline takes image, which the page does not")


@pytest.mark.parametrize("place", ["pipeline", "unet"])
def test_code_of_a_checkpoint_is_not_run(error, text_to_image, tmp_path, place):
    folder = shutil.copytree(text_to_image, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    if place == "pipeline":
        index["_class_name"] = ["own", "Pipeline"]
        (folder / "own.py").write_text(code)
    else:
        index["unet"] = ["own", "UNet"]
        (folder / "unet" / "own.py").write_text(code)
    (folder / "model_index.json").write_text(json.dumps(index))
    for words in ([folder], [text_to_image, "--original", folder]):
        assert f"the {place} of {folder} is in " in error(*words)
    assert not (tmp_path / "ran").exists()

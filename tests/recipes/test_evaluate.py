import numpy as np
import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDPMPipeline, DDPMScheduler
from evaluation.tiny_clip import save_clip
from PIL import Image
from tiny_stable_diffusion import save_stable_diffusion
from torch import nn

from ofadiff import OFAPipeline
from ofadiff.evaluation import Report, register_extractor
from recipes.evaluate import command_line, main


def make_teacher():
    torch.manual_seed(0)
    return plain_unet(in_channels=1, out_channels=1, num_class_embeds=10)


class Means(nn.Module):
    """Averages of the quarters of an image."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, its OFA checkpoint, an extracted size, and real images."""
    folder = tmp_path_factory.mktemp("files")
    scheduler = DDPMScheduler(num_train_timesteps=50)
    DDPMPipeline(make_teacher(), scheduler).save_pretrained(folder / "teacher")
    unet = make_teacher()
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "ofa")
    supernet.save_pretrained(folder / "ofa" / "unet")
    OFAPipeline.from_pretrained(folder / "ofa").extract(0.5).save_pretrained(folder / "size-0.5")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(noise.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / "images" / f"{index}.png")
    register_extractor("means", Means())
    return folder


@pytest.fixture
def flags(files, tmp_path):
    def flags(**options):
        settings = {
            "checkpoint": files / "ofa",
            "teacher": files / "teacher",
            "reference_dir": files / "images",
            "extractor": "means",
            "num_samples": 6,
            "num_shown": 2,
            "num_inference_steps": 2,
            "device": "cpu",
            "output_dir": tmp_path / "out",
        }
        settings |= options
        given = {name: value for name, value in settings.items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]

    return flags


def test_the_report_of_a_checkpoint(flags, tmp_path, capsys):
    main(flags(scheduler="ddim"))
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert [row.label for row in report.rows] == ["teacher", "1.0", "0.5"]
    assert report.rows[1].values["psnr"] > 40 > report.rows[2].values["psnr"]
    assert report.protocol["scheduler"] == "DDIMScheduler"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    assert report.table() in capsys.readouterr().out


def test_an_extracted_size_has_one_row(flags, files, tmp_path):
    main(flags(checkpoint=files / "size-0.5", metrics="macs ssim"))
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert [row.label for row in report.rows] == ["teacher", "model"] and "macs" in report.columns


def test_text_to_image_takes_a_file_of_prompts(flags, tmp_path, capsys):
    save_stable_diffusion(tmp_path / "model")
    save_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    options = {
        "checkpoint": tmp_path / "model",
        "teacher": None,
        "reference_dir": None,
        "metrics": "clip_score",
        "prompts_file": tmp_path / "prompts.txt",
        "clip_model": tmp_path / "clip",
        "guidance_scale": 2.5,
        "resolution": 24,
    }
    main(flags(**options))
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert 0 <= report.rows[0].values["clip_score"] <= 1
    stated = {
        "prompts": 2,
        "guidance scale": 2.5,
        "resolution": "24x24 pixels",
        "CLIP score": "mean cosine (w = 1), clip",
    }
    assert stated.items() <= report.protocol.items()
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(SystemExit):
        main(flags(**options | {"prompts_file": None, "metrics": "macs", "output_dir": tmp_path / "other"}))
    assert "makes images of prompts, and there are none; give" in capsys.readouterr().err


def test_paths_of_this_machine_stay_out_of_the_command():
    words = ["--checkpoint", "/home/me/ofa", "--output_dir", "out dir"]
    assert command_line(words) == "python recipes/evaluate.py --checkpoint ofa --output_dir 'out dir'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere holds no model_index.json"),
        ({"teacher": "nowhere"}, "nowhere holds no model_index.json"),
        ({"sizes": "0.3"}, "size is 0.3; it must be one of 0.5, 1"),
        ({"metrics": "speed"}, "invalid choice: 'speed'"),
        ({"metrics": "fid", "reference_dir": None}, "'fid' cannot be measured: there are no reference images"),
        ({"metrics": "psnr", "teacher": None}, "'psnr' cannot be measured: there is no teacher"),
        ({"metrics": "clip_score"}, "'clip_score' cannot be measured: there are no prompts; give --prompts_file"),
        ({"prompts_file": "nowhere"}, "nowhere is not a file of prompts"),
        ({"reference_dir": "nowhere"}, "nowhere is not a folder of images"),
        ({"extractor": "nothing"}, "extractor is 'nothing'; it must be one of inception"),
        ({"num_samples": "0"}, "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(flags, monkeypatch, capsys, options, message):
    monkeypatch.setattr("recipes.evaluate.load_pipeline", None)
    with pytest.raises(SystemExit) as stop:
        main(flags(**options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_a_report_is_replaced_only_when_asked(flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(flags(metrics="macs", sizes="0.5"))
    assert "is not empty" in capsys.readouterr().err
    main([*flags(metrics="macs", sizes="0.5"), "--overwrite_output_dir"])
    assert {"notes.txt", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_it_reads_the_command_line(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes/evaluate.py", *flags(checkpoint="nowhere")])
    with pytest.raises(SystemExit):
        main()
    assert "evaluate.py: error: nowhere holds no model_index.json" in capsys.readouterr().err

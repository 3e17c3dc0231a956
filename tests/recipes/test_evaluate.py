import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from evaluation.tiny_clip import save_clip
from PIL import Image
from recipes.conftest import load_recipe
from tiny_stable_diffusion import save_stable_diffusion
from torch import nn

from ofadiff import OFAPipeline
from ofadiff.commands import command
from ofadiff.commands.evaluate import Measured, ReportFiles, Samples, command_line
from ofadiff.evaluation import Report, register_extractor
from ofadiff.evaluation.saved_images import SavedImages

pytestmark = pytest.mark.slow


def main(words=None):
    command.main(load_recipe("evaluate.py"), words)


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
            "output_dir": tmp_path / "out",
        }
        settings |= options
        given = {name: value for name, value in settings.items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]

    return flags


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def samples(folder):
    """Content of the images in an output folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("samples/**/*.png"))}


def values(folder):
    """What was measured, without what depends on how busy the machine is."""
    report = Report.from_json(folder / "report.json")
    return [
        (row.series, row.label, {k: v for k, v in row.values.items() if k not in ("latency", "memory")})
        for row in report.rows
    ]


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


# The extractor of these tests, in processes of their own.
DRIVER = """
from torch import nn
from ofadiff.commands.command import main, script
from ofadiff.commands.evaluate import evaluate_checkpoint
from ofadiff.evaluation import register_extractor

class Means(nn.Module):
    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

register_extractor("means", Means())
main(script(evaluate_checkpoint, "evaluate.py"))
"""


def test_two_processes_make_the_report_of_one(flags, files, fork, tmp_path):
    # Five batches: the first process has three of them, the second two.
    options = {"num_samples": 9, "batch_size": 2, "compare": f"again={files / 'size-0.5'}", "sizes": "0.5"}
    options |= {"metrics": "fid kid psnr ssim latency", "scheduler": "ddpm"}
    (tmp_path / "driver.py").write_text(DRIVER)
    ended, log = fork(tmp_path / "driver.py", flags(output_dir=tmp_path / "two", **options))
    assert ended == [0, 0], log
    assert log.count("report.html shows it all") == 1
    main(flags(output_dir=tmp_path / "one", **options))
    one = samples(tmp_path / "one")
    assert len(one) == 3 * 9 and samples(tmp_path / "two") == one
    assert values(tmp_path / "two") == values(tmp_path / "one")
    shown = [(tmp_path / name / "samples.png").read_bytes() for name in ("one", "two")]
    assert shown[0] == shown[1]
    report = Report.from_json(tmp_path / "two" / "report.json")
    assert report.protocol["batches"] == "2 images, 2 processes"
    assert all(row.values["latency"] > 0 for row in report.rows)


def test_a_killed_evaluation_goes_on_with_what_is_missing(flags, tmp_path, monkeypatch):
    options = {"batch_size": 2, "scheduler": "ddpm", "metrics": "kid psnr", "sizes": "0.5"}
    main(flags(output_dir=tmp_path / "whole", **options))
    whole = samples(tmp_path / "whole")
    write, written = SavedImages.__setitem__, []

    def die(self, index, image):
        if len(written) == 7:
            raise KeyboardInterrupt
        write(self, index, image)
        written.append(index)

    monkeypatch.setattr(SavedImages, "__setitem__", die)
    with pytest.raises(SystemExit):
        main(flags(**options))
    left = samples(tmp_path / "out")
    assert len(left) == 7 and left.items() <= whole.items()
    cut = tmp_path / "out" / sorted(left)[0]
    cut.write_bytes(cut.read_bytes()[:-3])

    written.clear()
    monkeypatch.setattr(SavedImages, "__setitem__", lambda *a: (write(*a), written.append(a[1])))
    main(flags(**options))
    assert samples(tmp_path / "out") == whole and len(written) == 2 * 6 - 7 + 1
    assert values(tmp_path / "out") == values(tmp_path / "whole")
    # More images add to those there are, and another batch size changes none but by rounding.
    written.clear()
    main(flags(**options | {"num_samples": 7, "batch_size": 7}))
    assert written == [6, 6]


@pytest.mark.parametrize("left", [(), ("protocol.json.tmp",)], ids=["a folder", "the beginnings of a protocol"])
def test_an_evaluation_that_was_killed_while_it_began_is_begun_again(flags, tmp_path, left):
    (tmp_path / "out" / "samples" / "teacher").mkdir(parents=True)
    for name in left:
        (tmp_path / "out" / "samples" / "teacher" / name).write_text("{")
    main(flags(metrics="psnr", num_samples=1, num_shown=1, num_inference_steps=1, sizes="0.5"))
    assert len(samples(tmp_path / "out")) == 2 and not list(tmp_path.rglob("*.tmp"))


def test_images_of_another_protocol_are_not_mixed_in(flags, files, tmp_path, capsys):
    main(flags(metrics="psnr", sizes="0.5", num_inference_steps=1))
    before = samples(tmp_path / "out")

    def refused(message, **options):
        with pytest.raises(SystemExit):
            main(flags(metrics="psnr", sizes="0.5", **{"num_inference_steps": 1, **options}))
        assert message in capsys.readouterr().err
        assert samples(tmp_path / "out") == before

    refused("were made with denoising steps 1, not 2; choose another folder", num_inference_steps=2)
    refused("were made with first seed 0, not 7", seed=7)
    refused("were made with scheduler DDPMScheduler, not DDIMScheduler", scheduler="ddim")
    refused("were made with precision float32, not bfloat16", dtype="bfloat16")
    shutil.copytree(files / "teacher", tmp_path / "teacher")
    unet = UNet2DModel.from_pretrained(tmp_path / "teacher" / "unet")
    with torch.no_grad():
        unet.conv_in.bias[0] += 1e-3
    unet.save_pretrained(tmp_path / "teacher" / "unet")
    refused("teacher were made with weights of unet SHA-256", teacher=tmp_path / "teacher")
    main([*flags(metrics="psnr", sizes="0.5"), "--overwrite_output_dir"])
    assert samples(tmp_path / "out").keys() == before.keys() and samples(tmp_path / "out") != before


def test_statistics_stand_in_for_images(flags, files, tmp_path, capsys, monkeypatch):
    options = {"teacher": None, "metrics": "fid", "sizes": "0.5"}
    saved = tmp_path / "real.safetensors"
    main(flags(save_reference_statistics=saved, **options))
    main(flags(save_reference_statistics=saved, **options))  # goes on from where it was
    with pytest.raises(SystemExit):
        main(flags(save_reference_statistics=saved, output_dir=tmp_path / "other", **options))
    assert "real.safetensors exists; replace it with" in capsys.readouterr().err
    options |= {"reference_dir": None, "reference_statistics": saved}
    main(flags(output_dir=tmp_path / "other", **options))
    assert values(tmp_path / "other") == values(tmp_path / "out")
    protocol = Report.from_json(tmp_path / "other" / "report.json").protocol
    assert protocol["reference"] == "statistics of 8 images, real.safetensors"
    assert protocol["reference resized"].startswith("centre crop")
    options |= {"output_dir": tmp_path / "third", "metrics": "fid kid"}
    with pytest.raises(SystemExit):
        main(flags(**options))
    assert "'kid' cannot be measured: there are statistics of the reference images" in capsys.readouterr().err
    monkeypatch.delattr("ofadiff.commands.evaluate.evaluate")
    with pytest.raises(NameError):
        main(flags(**options | {"metrics": None}))
    assert capsys.readouterr().out == "No KID: it takes reference images, and there are only their statistics\n"


def test_a_data_set_is_a_reference(flags, files, tmp_path):
    paths = [str(path) for path in sorted((files / "images").iterdir())]
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"validation": images}).save_to_disk(str(tmp_path / "data"))
    options = {"teacher": None, "metrics": "kid", "sizes": "0.5"}
    main(flags(reference_dir=None, reference_dataset_name=tmp_path / "data", **options))
    main(flags(output_dir=tmp_path / "other", **options))
    assert values(tmp_path / "other") == values(tmp_path / "out")


def test_a_pipeline_may_have_a_hub_name(flags, files, tmp_path, monkeypatch):
    folders = {"lab/ofa": str(files / "ofa"), "lab/original": str(files / "teacher")}
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: folders[name])
    monkeypatch.setattr("ofadiff.storage.pipeline_folder.snapshot_download", lambda name, **options: folders[name])
    main(flags(checkpoint="lab/ofa", teacher="lab/original", compare="same=lab/original", metrics="psnr", sizes="0.5"))
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert [row.series for row in report.rows] == ["teacher", "OFA", "same"]


def test_paths_of_this_machine_stay_out_of_the_command():
    measured = Measured(checkpoint="/home/me/ofa", compare=("old=/home/me/old",))
    expected = "ofadiff evaluate --checkpoint ofa --compare old=old --seed 3 --output_dir 'out dir'"
    assert command_line(measured, Samples(seed=3), ReportFiles(output_dir="out dir")) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere holds no model_index.json"),
        ({"teacher": "nowhere"}, "nowhere holds no model_index.json"),
        ({"sizes": "0.3"}, "size is 0.3; it must be one of 0.5, 1"),
        ({"metrics": "speed"}, "'speed' is none of macs, latency"),
        ({"metrics": "fid", "reference_dir": None}, "'fid' cannot be measured: there are no reference images"),
        ({"metrics": "psnr", "teacher": None}, "'psnr' cannot be measured: there is no teacher"),
        ({"metrics": "clip_score"}, "'clip_score' cannot be measured: there are no prompts; give --prompts_file"),
        ({"prompts_file": "nowhere"}, "nowhere is not a file of prompts"),
        ({"reference_dir": "nowhere"}, "nowhere is not a folder of images"),
        ({"extractor": "nothing"}, "extractor is 'nothing'; it must be one of inception"),
        ({"compare": "nowhere"}, "--compare nowhere is not NAME=FOLDER"),
        ({"compare": "a=nowhere"}, "nowhere holds no model_index.json"),
        ({"reference_statistics": "nowhere"}, "exclude each other"),
        ({"reference_dir": None, "reference_statistics": "nowhere"}, "nowhere is not a file"),
        ({"reference_dir": None, "reference_dataset_name": "nowhere"}, "cannot load the data set 'nowhere'"),
        ({"save_reference_statistics": "real.npz"}, "real.npz does not end in .safetensors"),
        ({"num_samples": "0"}, "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(flags, monkeypatch, capsys, options, message):
    monkeypatch.setattr("ofadiff.commands.evaluate.load_pipeline", None)
    with pytest.raises(SystemExit) as stop:
        main(flags(**options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_a_report_is_replaced_only_when_asked(flags, tmp_path, capsys):
    (tmp_path / "out" / "samples").mkdir(parents=True)  # as training leaves it too
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

import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from cyclopts import CycloptsError
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from PIL import Image
from recipes.conftest import load_recipe

from ofadiff import OFAPipeline, Supernet
from ofadiff.commands import command

pytestmark = pytest.mark.slow


def save_teacher(folder, **changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    DDPMPipeline(UNet2DModel(**{**config, **changes}), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Teachers, and images of three classes."""
    folder = tmp_path_factory.mktemp("files")
    save_teacher(folder / "unconditional")
    save_teacher(folder / "conditional", num_class_embeds=3)
    noise = np.random.default_rng(0)
    for index in range(12):
        path = folder / "images" / str(index % 3) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (10, 9), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def flags(files, tmp_path, words):
    """Makes a command line; options are flags without their dashes, None leaves one out."""

    def flags(**options):
        settings = {
            "pretrained_model_name_or_path": files / "unconditional",
            "train_data_dir": files / "images",
            "output_dir": tmp_path / "out",
            "sizes": "0.5 1.0",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "importance_samples": 8,
            "correction_samples": 8,
            "validation_samples": 8,
            "num_validation_images": 0,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 2,
        }
        return words(settings | options)

    return flags


@pytest.fixture
def run(flags, recipe):
    return lambda **options: recipe("compress_ddpm.py", flags(**options))


def weights(folder):
    return Supernet.from_pretrained(folder / "unet").model.state_dict()


def test_sizes_in_latency_are_measured_and_their_table_is_printed(run, tmp_path, capsys, mac_clock):
    run(budget="latency", sizes="0.6 1.0", max_train_steps=0)
    subnets = OFAPipeline.from_pretrained(tmp_path / "out").subnets
    assert subnets.budget == "latency" and subnets.full_latency_ms == subnets.full_macs * 1000
    assert subnets[0].latency_ms / subnets.full_latency_ms == pytest.approx(0.6, abs=0.005)
    measured = f"{subnets[0].macs * 1000:.4g} ms ({subnets[0].macs / subnets.full_macs:.1%})"
    assert re.search(
        rf"0\.6 +{re.escape(measured)} +{subnets[0].macs / subnets.full_macs:.1%}\n", capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"size 0\.2 is not possible.* of the full model's latency"):
        run(budget="latency", sizes="0.2 1.0", output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("teacher", ["unconditional", "conditional"])
def test_the_result_is_a_pipeline_with_every_size(run, files, tmp_path, teacher, capsys):
    result = run(
        pretrained_model_name_or_path=files / teacher,
        num_validation_images=2,
        ddpm_num_inference_steps=2,
        validation_steps=2,
    )
    assert set(result.history) == {0, 2, 3}
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("parameters", "MACs", "validation loss", "teacher"))
    condition = {"class_labels": [0, 2]} if teacher == "conditional" else {"batch_size": 2}
    pipeline = OFAPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.sizes == (0.5, 1.0)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(size=0.5, num_inference_steps=2, **condition).images) == 2
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(plain) is DDPMPipeline and type(plain.unet) is UNet2DModel
    with Image.open(tmp_path / "out" / "samples" / "000003.png") as grid:
        assert grid.size == (2 * 8, 2 * 8)  # two seeds by two sizes


def test_sizes_that_are_not_trained_are_fitted_in_closed_form(run, files, tmp_path):
    untrained = {"max_train_steps": 0, "train_data_dir": files / "images", "importance_samples": 8}
    original = UNet2DModel.from_pretrained(files / "unconditional" / "unet")
    sample, time = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5, 45, 10)
    distances = {}
    for name, samples, rank in (("cut", 0, 0), ("shared", 32, 0), ("own", 32, 4)):
        run(output_dir=tmp_path / name, correction_samples=samples, correction_rank=rank, **untrained)
        with torch.no_grad():
            small = OFAPipeline.from_pretrained(tmp_path / name, size=0.5).unet
            distances[name] = float((small(sample, time).sample - original(sample, time).sample).square().mean())
    assert distances["own"] < distances["shared"] < distances["cut"]
    assert list(Supernet.from_pretrained(tmp_path / "own" / "unet").size_adapters) == [0.5, 1.0]
    with pytest.raises(ValueError, match=r"--correction_rank 4 is for sizes that are not trained.* trains 3 steps"):
        run(output_dir=tmp_path / "refused", correction_rank=4)
    with pytest.raises(ValueError, match="--correction_rank needs --correction_samples"):
        run(output_dir=tmp_path / "refused", correction_rank=4, correction_samples=0, max_train_steps=0)
    assert not (tmp_path / "refused").exists()


def test_two_processes_train_as_one_does(run, launch, flags, tmp_path):
    # Adam divides by the gradient's size; the epsilon keeps rounding from counting where there is next to no gradient.
    # The small size has no gradient at all for the branches that it drops.
    options = {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "sizes": "0.25 1.0", "min_keep": 0}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = flags(train_batch_size=2, output_dir=tmp_path / "two", **options)
    two = launch("compress_ddpm.py", words, launcher, ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    run(train_batch_size=4, output_dir=tmp_path / "one", **options)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)
    assert 0 in Supernet.from_pretrained(tmp_path / "two" / "unet").subnets[0].widths.values()


def test_a_run_resumes_and_never_overwrites_unasked(run, tmp_path):
    out = tmp_path / "out"
    run(output_dir=tmp_path / "whole")
    run(resume_from_checkpoint="latest")  # nothing there yet
    shutil.rmtree(out / "unet")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another one"):
        run()
    run(resume_from_checkpoint="latest")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    with pytest.raises(ValueError, match="its seed is 0, this run's is 1"):
        run(resume_from_checkpoint="latest", seed=1)
    with pytest.raises(ValueError, match=r"its --sizes is \[0.5, 1.0\], not \[0.6, 1.0\]"):
        run(resume_from_checkpoint="latest", sizes="0.6 1.0")
    (out / "unet" / "ofa_adapters" / "0.5").mkdir(parents=True)  # finetune_size.py made it
    with pytest.raises(ValueError, match=r"has adapters of sizes, .*which this run would remove"):
        run(resume_from_checkpoint="latest")
    run(overwrite_output_dir=True, sizes="0.6 1.0", checkpointing_steps=3)
    assert not list((out / "unet").glob("ofa_adapters/*"))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_mistake_ends_in_one_sentence(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(load_recipe("compress_ddpm.py"), flags(sizes="0.01 1.0"))
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("compress_ddpm.py: error: ") and "smallest" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": None}, "one of --train_data_dir and --dataset_name"),
        ({"train_data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"resolution": 9}, "--resolution 9 is not a multiple of 2"),
        ({"min_keep": 2}, "min_keep is 2"),
        ({"validation_fraction": 1.5}, "fraction is 1.5"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a checkpoint"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "exclude each other"),
        ({"report_to": "pigeon"}, "--report_to pigeon: not installed or unknown"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "0.5 1.2"}, "'1.2' is not a size"),
        ({"criterion": "tailor"}, "'tailor' is none of taylor, magnitude, random"),
        ({"budget": "money"}, "'money' is none of params, macs, latency, channels"),
        ({"reweight": "linaer"}, "'linaer' is none of spread, linear, uniform, sandwich"),
        ({"max_train_steps": 1.5}, "'1.5' is not a whole number"),
        ({"train_batch_size": 0}, "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_refused_by_the_parser(run, tmp_path, options, message):
    with pytest.raises(CycloptsError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_only_ddpm_style_pipelines_are_taken(run, files, tmp_path):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            run(pretrained_model_name_or_path=folder)

    refused(files / "images", "it has no model_index.json")
    refused(files / "unconditional" / "unet", "it is the folder of a single UNet2DModel")
    refused(tmp_path / "nowhere", "cannot load .*nowhere, expected .*; no such folder, and the hub gave none")
    save_teacher(tmp_path / "variance", out_channels=2)
    refused(tmp_path / "variance", "1 input and 2 output channels")

    text_unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(text_unet, DDPMScheduler()).save_pretrained(tmp_path / "text")
    refused(
        tmp_path / "text",
        "expected a pipeline of a scheduler and a UNet2DModel as its unet; .* a UNet2DConditionModel as its unet",
    )
    run()
    refused(tmp_path / "out", "own folder")
    with pytest.raises(ValueError, match="is compressed already"):
        run(pretrained_model_name_or_path=tmp_path / "out", output_dir=tmp_path / "again")


def test_classes_must_fit_the_model(run, files, tmp_path):
    teacher = files / "conditional"
    shutil.copytree(files / "images" / "0", tmp_path / "flat")
    with pytest.raises(ValueError, match="the images have no labels: put each class in a subfolder"):
        run(pretrained_model_name_or_path=teacher, train_data_dir=tmp_path / "flat")
    shutil.copytree(files / "images", tmp_path / "four")
    shutil.copytree(files / "images" / "0", tmp_path / "four" / "3")
    with pytest.raises(ValueError, match="label 3 of the images is not one of the model's 3 classes"):
        run(pretrained_model_name_or_path=teacher, train_data_dir=tmp_path / "four")


def test_a_saved_data_set_takes_the_place_of_a_folder(run, files, tmp_path):
    pictures = [str(path) for path in sorted((files / "images").rglob("*.png"))]
    columns = {"picture": pictures, "kind": [index % 3 for index in range(len(pictures))]}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    source = {"train_data_dir": None, "dataset_name": tmp_path / "set", "image_column": "picture"}
    source |= {"label_column": "kind", "report_to": "tensorboard"}
    assert run(pretrained_model_name_or_path=files / "conditional", max_train_steps=1, **source).steps == 1
    assert len(list((tmp_path / "out" / "logs").rglob("events.out.*"))) > 0


def test_unreadable_images_are_named_before_training(run, files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "images")
    (tmp_path / "images" / "1" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 13 images cannot be read: .*broken.png"):
        run(train_data_dir=tmp_path / "images")
    assert not (tmp_path / "out").exists()

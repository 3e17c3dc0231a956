import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from cyclopts import CycloptsError
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from recipes.conftest import load_recipe
from recipes.tiny_stable_diffusion import save_captioned_images, save_stable_diffusion, save_stable_diffusion_xl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.tiny_shards import save_shards

from ofadiff import OFAPipeline, Supernet
from ofadiff.commands import command
from ofadiff.denoisers.original import Original
from ofadiff.noise.choice import make_noise_scheduler
from ofadiff.runs import Compression, Data, Model, Optimization, Output, RunSettings, start
from ofadiff.runs.size_checks import check_sizes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Stable Diffusion 1.x, 2.x and XL in small, and captioned images."""
    folder = tmp_path_factory.mktemp("files")
    save_stable_diffusion(folder / "sd1")
    save_stable_diffusion(folder / "sd2", "v_prediction", use_linear_projection=True)
    save_stable_diffusion_xl(folder / "sdxl")
    save_captioned_images(folder / "images")
    save_shards(folder / "shards")
    return folder


@pytest.fixture
def flags(files, tmp_path, words):
    """Makes a command line; options are flags without their dashes, None leaves one out."""

    def flags(**options):
        settings = {
            "pretrained_model_name_or_path": files / "sd1",
            "train_data_dir": files / "images",
            "cache_dir": files / "cache",
            "output_dir": tmp_path / "out",
            "resolution": 16,
            "sizes": "0.6 1.0",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "importance_samples": 4,
            "correction_samples": 4,
            "validation_samples": 4,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 2,
        }
        return words(settings | options)

    return flags


@pytest.fixture
def run(flags, recipe):
    return lambda **options: recipe("compress_sd.py", flags(**options))


STREAMED = {"image_column": "png", "caption_column": "txt", "streaming": True, "shuffle_buffer_size": 3}


def weights(folder):
    return Supernet.from_pretrained(folder / "unet").model.state_dict()


PIPELINES = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("model", PIPELINES)
def test_the_result_is_the_original_pipeline_with_every_size(run, files, tmp_path, model, capsys):
    result = run(
        pretrained_model_name_or_path=files / model,
        correction_samples=0,
        random_flip=True,
        feature_distill_weight=0.1,
        validation_prompts=["a red house", "noise"],
        validation_inference_steps=1,
        validation_steps=2,
    )
    assert set(result.history) == {0, 2, 3}
    # The largest size starts as the teacher, as nothing is fitted before: the same noise, the same target, whatever the
    # model predicts.
    assert result.history[0][1.0] == pytest.approx(result.teacher_loss, rel=1e-4)
    out = tmp_path / "out"
    with Image.open(out / "samples" / "000003.png") as grid:
        assert grid.size == (2 * 16, 2 * 16)  # two prompts by two sizes
    card = (out / "README.md").read_text()
    assert "| 0.6 |" in card and str(files / "images") in card

    pipeline = OFAPipeline.from_pretrained(out)
    assert pipeline.sizes == (0.6, 1.0)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("a b", height=16, width=16, num_inference_steps=1, size=0.6).images) == 1
    plain = DiffusionPipeline.from_pretrained(out)
    assert type(plain) is PIPELINES[model] and type(plain.unet) is UNet2DConditionModel
    original = DiffusionPipeline.from_pretrained(files / model)
    assert plain.scheduler.config.prediction_type == original.scheduler.config.prediction_type
    for name in ("vae", "text_encoder"):
        expected = getattr(original, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(plain, name).state_dict().items())


def test_two_processes_train_as_one_does(run, fork, flags, files, tmp_path):
    # Adam divides by the gradient's size; the epsilon keeps rounding from counting where there is next to no gradient.
    options = {"pretrained_model_name_or_path": files / "sdxl", "learning_rate": 1e-3, "adam_epsilon": 1e-4}
    options |= {"cache_dir_latents": tmp_path / "latents", "center_crop": True}
    line = flags(train_batch_size=2, output_dir=tmp_path / "two", **options)
    ended, log = fork("compress_sd.py", line)
    assert ended == [0, 0], log
    # Encoded in the loop, where the two processes encoded everything first.
    run(train_batch_size=4, output_dir=tmp_path / "one", **{**options, "cache_dir_latents": None})
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)


def test_two_processes_train_on_a_stream_as_one_does(run, fork, flags, files, tmp_path):
    options = {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "max_train_steps": 2, **STREAMED}
    options |= {"train_data_dir": None, "dataset_name": "webdataset", "dataset_data_files": files / "shards" / "*.tar"}
    line = flags(train_batch_size=2, output_dir=tmp_path / "two", **options)
    ended, log = fork("compress_sd.py", line)
    assert ended == [0, 0], log
    run(train_batch_size=4, output_dir=tmp_path / "one", **options)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)


def test_processes_that_split_the_weights_train_as_one_does(run, fork, flags, files, tmp_path):
    options = {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "max_train_steps": 2,
        "feature_distill_weight": 0.1,
    }
    options |= {"validation_prompts": ["a"], "validation_inference_steps": 1}
    line = flags(train_batch_size=2, output_dir=tmp_path / "two", **options)
    ended, log = fork("compress_sd.py", line, sharded=True)
    assert ended == [0, 0], log
    run(train_batch_size=4, output_dir=tmp_path / "one", **options)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)
    with Image.open(tmp_path / "two" / "samples" / "000002.png") as grid:
        assert grid.size == (16, 2 * 16)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "two").unet) is UNet2DConditionModel


@pytest.mark.parametrize("data", ["images", "latents", "stream"])
def test_a_killed_run_resumes_to_the_same_weights(run, files, tmp_path, data):
    options = {"snr_gamma": 5, "noise_offset": 0.1, "random_flip": True, "offload_ema": True}
    if data == "latents":
        options |= {"center_crop": True, "cache_dir_latents": tmp_path / "latents"}
    elif data == "stream":
        options |= {"train_data_dir": files / "shards", **STREAMED}
    run(output_dir=tmp_path / "whole", **options)
    run(**options)
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(tmp_path / "out" / name)
    run(resume_from_checkpoint="latest", **options)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "out").items())


def test_latents_are_encoded_once_and_belong_to_one_model_and_data(run, files, tmp_path):
    options = {"cache_dir_latents": tmp_path / "latents", "center_crop": True, "max_train_steps": 1}
    run(**options)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.safetensors")}
    assert len(written) == 12 + 1  # the images, and the empty caption
    run(seed=1, output_dir=tmp_path / "again", **options)  # other images are held out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(ValueError, match="were made with resolution 16, not 32; choose another folder or remove it"):
        run(resolution=32, output_dir=tmp_path / "larger", **options)


def test_half_precision_ends_in_a_full_precision_pipeline(run, files, tmp_path):
    begun = start(
        RunSettings(
            Model(pretrained_model_name_or_path=str(files / "sd1"), cache_dir=str(files / "cache")),
            Data(train_data_dir=str(files / "images"), resolution=16),
            Output(output_dir=str(tmp_path / "out")),
            optimization=Optimization(mixed_precision="bf16"),
        )
    )
    assert begun.teacher.dtype == begun.pipeline.vae.dtype == begun.pipeline.text_encoder.dtype == torch.bfloat16
    assert begun.denoiser.dtype == torch.float32
    watched = {"validation_prompts": ["a"], "validation_inference_steps": 1}
    result = run(mixed_precision="bf16", max_train_steps=1, correction_samples=0, **watched)
    assert result.history[0][1.0] == pytest.approx(result.teacher_loss, rel=0.01)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {part.dtype for part in (plain.unet, plain.vae, plain.text_encoder)} == {torch.float32}


def test_a_configuration_file_stands_in_for_flags(run, tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("sizes: [0.5, 1.0]\ncenter_crop: true\nrotate: false\nseed: 3\nlearning_rate: 1e-3\n")
    seen = {}
    monkeypatch.setattr("ofadiff.runs.start", lambda settings, kinds: seen.update(settings.flags()))
    with pytest.raises(AttributeError):  # nothing was started
        run(sizes=None, seed=4, config=config)
    names = ("sizes", "center_crop", "rotate", "seed", "learning_rate")
    assert [seen[name] for name in names] == [[0.5, 1.0], True, False, 4, 1e-3]
    for content, message in {
        "size: 0.5": r'Unknown option: "\[size\]"',
        "sizes: [2.0]": "'2' is not a size",
        "max_train_steps: 1.5": "'1.5' is not a whole number",
        "just words": "it holds a str, not lines of `flag: value`",
    }.items():
        config.write_text(content)
        with pytest.raises((CycloptsError, ValueError), match=message):
            run(sizes=None, max_train_steps=None, config=config)
    with pytest.raises(ValueError, match=r"cannot read --config .*nowhere.yaml: there is no such file"):
        run(config=tmp_path / "nowhere.yaml")


def test_sizes_of_stable_diffusion_15_are_known_before_any_weight_is_loaded():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    table = check_sizes(Compression(sizes=(0.35, 0.6, 1.0)), unet)
    assert table.full_params == 859_520_964
    assert table.full_macs == pytest.approx(402e9, rel=0.01)
    for subnet in table:
        assert subnet.params / table.full_params == pytest.approx(subnet.size, abs=0.005)
    # A quarter of every internal width leaves 34 % of the parameters.
    with pytest.raises(ValueError, match=r"the smallest subnet has 0\.34\d* of the full model"):
        check_sizes(Compression(sizes=(0.3, 1.0)), unet)


def test_the_result_is_uploaded_without_checkpoints_if_asked_for(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--push_to_hub needs a login: run `hf auth login` first"):
        run(push_to_hub=True)
    uploads = []
    monkeypatch.setattr("ofadiff.runs.checks.whoami", dict)
    monkeypatch.setattr("ofadiff.runs.result.create_repo", lambda name, exist_ok: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr("ofadiff.runs.result.upload_folder", lambda **options: uploads.append(options))
    run(push_to_hub=True, max_train_steps=1)
    assert [(upload["repo_id"], upload["folder_path"]) for upload in uploads] == [("me/out", str(tmp_path / "out"))]
    assert "checkpoint-*" in uploads[0]["ignore_patterns"]


def test_a_mistake_ends_in_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes/compress_sd.py", *flags(sizes="0.01 1.0")])
    with pytest.raises(SystemExit) as exit:
        command.main(load_recipe("compress_sd.py"))
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and message.startswith("compress_sd.py: error: ") and "smallest" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": None}, "one of --train_data_dir and --dataset_name"),
        ({"train_data_dir": "nowhere"}, "--train_data_dir nowhere is not a folder"),
        ({"caption_column": "prompt"}, "no column 'prompt' of captions; its columns: image, text"),
        ({"resolution": 17}, "--resolution 17 is not a multiple of 2"),
        ({"proportion_empty_prompts": 2}, "share of empty captions is 2"),
        ({"cache_dir_latents": "latents"}, "--cache_dir_latents needs --center_crop"),
        ({"cache_dir_latents": "x", "center_crop": True, "streaming": True}, "--cache_dir_latents and --streaming"),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs bitsandbytes"),
    ],
)
def test_what_cannot_work_is_said_before_any_model_is_loaded(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(Original, "load", None)
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_only_text_to_image_pipelines_are_taken(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Original, "load", None)

    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            run(pretrained_model_name_or_path=folder)

    refused(files / "images", "it has no model_index.json")
    refused(files / "sd1" / "unet", "it is the folder of a single UNet2DConditionModel")
    refused(tmp_path / "nowhere", "no such folder, and the hub gave none")
    shutil.copytree(files / "sd1", tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    refused(tmp_path / "other", "other is a KandinskyPipeline; expected .* StableDiffusionXLPipeline")
    save_stable_diffusion(tmp_path / "inpainting", in_channels=9)
    refused(tmp_path / "inpainting", "9 input and 4 output channels, its VAE 4")
    with pytest.raises(ValueError, match="a FlowScheduler with prediction type None; expected a DDPM-style one"):
        make_noise_scheduler("FlowScheduler", {"shift": 3.0})


def test_images_that_cannot_be_read_are_named(run, files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "images")
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 12 images cannot be read: row 3"):
        run(train_data_dir=tmp_path / "images", cache_dir=tmp_path / "cache")
    lines = (tmp_path / "images" / "metadata.jsonl").read_text()
    (tmp_path / "images" / "metadata.jsonl").write_text(lines.replace("file_name", "name"))
    with pytest.raises(ValueError, match=r"cannot load the data set .*images"):
        run(train_data_dir=tmp_path / "images", cache_dir=tmp_path / "cache")
    (tmp_path / "images" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no column 'text' of captions; .* metadata.jsonl"):
        run(train_data_dir=tmp_path / "images", cache_dir=tmp_path / "cache")


def test_parquet_files_are_a_data_set_and_a_tracker_sees_losses_and_images(run, files, tmp_path):
    columns = {"picture": [str(path) for path in sorted((files / "images").glob("*.png"))]}
    columns["captions"] = [["one", "another"]] * len(columns["picture"])
    features = datasets.Features({"picture": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    (tmp_path / "parquet").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.map(lambda row: row).to_parquet(tmp_path / "parquet" / "train.parquet")
    source = {"train_data_dir": tmp_path / "parquet", "image_column": "picture", "caption_column": "captions"}
    watched = {"report_to": "tensorboard", "validation_prompts": ["a"], "validation_inference_steps": 1}
    assert run(max_train_steps=1, validation_fraction=0, **source, **watched).steps == 1
    logged = EventAccumulator(str(tmp_path / "out" / "logs" / "ofadiff-sd")).Reload().Tags()
    assert {"loss", "samples_per_second"} < set(logged["scalars"]) and logged["images"] == ["samples"]

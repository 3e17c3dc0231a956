"""The commands, on tiny models, as `ofadiff …` runs them."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import output, plain_unet, random_inputs, relative_error
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from recipes.test_compress_dit import files as dit_files  # noqa: F401
from recipes.tiny_stable_diffusion import save_captioned_images
from recipes.tiny_text_to_image import save_pipeline
from test_written_before import WRITTEN

from ofadiff import OFAPipeline
from ofadiff.commands import command
from ofadiff.commands.app import main, make_app

pytestmark = pytest.mark.slow

UNREAD = 141  # as a shell says of what `| head` has ended

TINY = {
    "max_train_steps": 1,
    "train_batch_size": 2,
    "importance_samples": 2,
    "correction_samples": 2,
    "validation_samples": 2,
    "lr_warmup_steps": 0,
}


@pytest.fixture
def run(words):
    """Runs a command in this process; `run(name, **options)` raises what it raises."""
    return lambda name, **options: command.call(make_app(), [name, *words(options)])


@pytest.fixture
def words():
    def words(options):
        line = []
        for name, value in options.items():
            line += [] if value is None else [f"--{name}", *([] if value is True else str(value).split())]
        return line

    return words


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tiny pixel model, and images for it."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    DDPMPipeline(plain_unet(), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "original")
    save_captioned_images(folder / "images")
    (folder / "images" / "metadata.jsonl").unlink()
    return folder


def test_from_the_original_to_a_report(run, digits, tmp_path, capsys):
    originals = {"pretrained_model_name_or_path": digits / "original", "train_data_dir": digits / "images"}
    made = run("compress", **originals, **TINY, output_dir=tmp_path / "ofa", sizes="0.6 1.0", num_validation_images=0)
    assert made.steps == 1
    checkpoint = {"pretrained_model_name_or_path": tmp_path / "ofa", "train_data_dir": digits / "images"}
    tiny = {name: value for name, value in TINY.items() if name not in ("importance_samples", "correction_samples")}
    healed = {"size": "smallest", "lora_rank": 2, "num_validation_images": 0}
    run("heal", **checkpoint, **tiny, **healed, output_dir=tmp_path / "ofa")
    assert list(OFAPipeline.from_pretrained(tmp_path / "ofa").supernet.size_adapters) == [0.6]
    folders = run("extract", checkpoint=tmp_path / "ofa", sizes="smallest", output_dir=tmp_path)
    assert folders == [tmp_path / "size-0.6"] and "its adapter merged" in capsys.readouterr().out
    measured = {"metrics": "macs psnr", "num_samples": 2, "num_inference_steps": 1, "num_shown": 1}
    files = {"teacher": digits / "original", "output_dir": tmp_path / "report"}
    report = run("evaluate", checkpoint=tmp_path / "ofa", **files, **measured)
    assert [row.label for row in report.rows] == ["teacher", "1.0", "0.6"]
    assert report.protocol["command"].startswith("ofadiff evaluate --checkpoint ofa --teacher original")


def test_it_writes_the_page_of_architectures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ofadiff.commands.architectures.architectures", list)
    run("architectures", output=tmp_path / "docs" / "page.md")
    assert (tmp_path / "docs" / "page.md").read_text().startswith("# Architectures")
    run("architectures")
    assert "# Architectures" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [2, None])
def test_one_size_of_a_class_conditional_transformer_is_healed(run, dit_files, tmp_path, rank):  # noqa: F811
    data = {"train_data_dir": dit_files / "images", "num_validation_images": 2, "validation_inference_steps": 1}
    original = {"pretrained_model_name_or_path": dit_files / "latents"}
    run("compress", **original, **data, **TINY, output_dir=tmp_path / "ofa", sizes="0.7 1.0")
    before = OFAPipeline.from_pretrained(tmp_path / "ofa", size=0.7).transformer
    out = tmp_path / "ofa" if rank else tmp_path / "small"
    healing = {
        **TINY,
        "max_train_steps": 8,
        "importance_samples": None,
        "correction_samples": None,
        "learning_rate": 1e-2,
        "ema_decay": 0,
    }
    checkpoint = {"pretrained_model_name_or_path": tmp_path / "ofa", "size": 0.7, "lora_rank": rank}
    result = run("heal", **checkpoint, **data, **healing, output_dir=out)
    assert result.history[8][0.7] < result.history[0][0.7]
    small = OFAPipeline.from_pretrained(out, size=0.7) if rank else DiffusionPipeline.from_pretrained(out)
    inputs = random_inputs(before)
    inputs["class_labels"] = inputs["class_labels"] % 3
    assert relative_error(output(small.transformer, inputs), output(before, inputs)) > 1e-3


def test_one_size_of_a_text_to_image_transformer_is_healed(run, tmp_path):
    save_pipeline("sd3", tmp_path / "original")
    save_captioned_images(tmp_path / "images")
    data = {"train_data_dir": tmp_path / "images", "cache_dir": tmp_path / "cache", "resolution": 32}
    data |= {"validation_prompts": "a", "validation_inference_steps": 1, "validation_fraction": 0.2}
    run("compress", pretrained_model_name_or_path=tmp_path / "original", **data, **TINY, output_dir=tmp_path / "ofa",
        sizes="0.7 1.0")  # fmt: skip
    healing = {
        **TINY,
        "importance_samples": None,
        "correction_samples": None,
        "lora_rank": 2,
        "output_dir": tmp_path / "ofa",
    }
    run("heal", pretrained_model_name_or_path=tmp_path / "ofa", size=0.7, **data, **healing)
    layers = json.loads((tmp_path / "ofa/transformer/ofa_adapters/0.7/adapter_config.json").read_text())
    assert {"to_q", "add_k_proj"} <= set(layers["target_modules"])
    assert (tmp_path / "ofa" / "finetune-0.7" / "samples" / "000001.png").is_file()


def test_flags_of_another_kind_of_model_are_refused(run, digits, dit_files, tmp_path):  # noqa: F811
    for folder, flags, message in (
        (
            digits / "original",
            {"caption_column": "words"},
            "--caption_column is for text-to-image models that are trained on images only",
        ),
        (
            digits / "original",
            {"validation_prompts": "a"},
            "--validation_prompts is for text-to-image models that are trained on images only",
        ),
        (
            dit_files / "latents",
            {"streaming": True},
            "--streaming is for text-to-image models that are trained on images only; .*latents is none",
        ),
        (dit_files / "latents", {"resolution": 8}, "--resolution 8 cannot be had: images of this model have 16"),
    ):
        data = {"train_data_dir": dit_files / "images", "output_dir": tmp_path / "out"}
        with pytest.raises(ValueError, match=message):
            run("compress", pretrained_model_name_or_path=folder, sizes="0.7 1.0", **data, **TINY, **flags)
        assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_sentence_and_debug_shows_where_it_comes_from(tmp_path, capsys):
    line = ["extract", "--checkpoint", str(tmp_path / "nowhere"), "--sizes", "1", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"ofadiff: error: {tmp_path / 'nowhere'} holds no model_index.json, " + (
        "so it is no diffusers pipeline folder\n"
    )
    with pytest.raises(ValueError, match="no diffusers pipeline folder"):
        main([*line, "--debug"])


MISSING = {
    "datasets": ("compress --dataset_name x", "data sets are read with datasets: pip install ofadiff[train]"),
    "peft": ("heal --size 0.5 --lora_rank 2", "--lora_rank needs peft, which is not installed: pip install peft"),
    "torch_fidelity": ("evaluate", "FID and KID need torch-fidelity: pip install ofadiff[eval]"),
    "matplotlib": ("evaluate", "plots need matplotlib: pip install ofadiff[eval]"),
    "jinja2": ("evaluate", "the report needs Jinja: pip install ofadiff[eval]"),
}
# Each command where one package is not installed, in a process where none was imported yet.
EACH = """
import json, sys
from ofadiff.commands.app import main
for missing, words in json.loads(sys.argv[1]).items():
    sys.modules[missing] = None
    try:
        main(words)
    except SystemExit as end:
        print(missing, end.code, file=sys.stderr)
    del sys.modules[missing]
"""


def test_a_missing_extra_is_one_sentence(digits, tmp_path):
    lines = {}
    for missing, (line, _) in MISSING.items():
        name, *rest = line.split()
        model = WRITTEN / "pipeline" if name == "heal" else digits / "original"
        rest += ["--checkpoint" if name == "evaluate" else "--pretrained_model_name_or_path", str(model)]
        rest += ["--reference_dir", str(digits / "images")] if name == "evaluate" else []
        lines[missing] = [name, *rest, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for missing, (_, said) in MISSING.items():
        assert f"ofadiff: error: {said}\n{missing} 2\n" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lines", [1, 10_000])
def test_nothing_is_said_where_nobody_reads(lines, capfd):
    app = command.make_app("speaks")
    app.default(lambda: print("a line\n" * lines))
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as unread, contextlib.redirect_stdout(unread), pytest.raises(SystemExit) as stop:
        command.main(app, [])
    assert stop.value.code == UNREAD and not capfd.readouterr().err

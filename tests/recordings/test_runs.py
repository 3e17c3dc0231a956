"""Costs on recorded calls, and what runs on recordings refuse."""

import os
import subprocess
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import DummyObject
from recordings.tiny_pipelines import CALLS, COMPONENT

import ofadiff
from ofadiff import allocate, find_channel_groups
from ofadiff.commands.app import make_app
from ofadiff.commands.command import call
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.profiling import count_macs
from ofadiff.recordings.joining import can_be_joined
from ofadiff.recordings.recorded_call import in_dtype

pytestmark = pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning")


def words_of(folder, out, *extra):
    words = f"compress --pretrained_model_name_or_path {folder / 'pipeline'} --calls_file {folder / 'calls.jsonl'} "
    words += "--max_train_steps 1 --train_batch_size 2 --importance_samples 2 --correction_samples 2 "
    words += "--steps_per_call 1 --lr_warmup_steps 0 "
    return [*words.split(), "--sizes", "0.8", "1.0", "--output_dir", str(out), *extra]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latte", "stable_audio"])  # nothing else is known of how either is called
def test_costs_are_those_of_a_recorded_call(kind, saved, load, tmp_path):
    pipeline = load(kind)
    denoiser = pipeline.transformer
    with pytest.raises(ValueError, match=f"no example inputs are known for {type(denoiser).__name__}.*or recordings"):
        example_inputs(denoiser)
    recordings = ofadiff.record(pipeline, CALLS[kind], tmp_path, 1, image_dir=saved(kind), progress=False)
    groups = find_channel_groups(denoiser)
    alike = {group.name: torch.arange(1.0, group.width + 1) for group in groups}
    sizes = (0.92, 1.0)
    unknown = allocate(denoiser, groups, alike, sizes)
    assert unknown.full_macs is None and {subnet.macs for subnet in unknown} == {None}
    with pytest.raises(ValueError, match="no example inputs are known"):
        allocate(denoiser, groups, alike, sizes, budget="macs")
    counted = allocate(denoiser, groups, alike, sizes, inputs=recordings)
    assert [subnet.widths for subnet in counted] == [subnet.widths for subnet in unknown]
    assert counted.full_macs == count_macs(denoiser, recordings) and counted[0].macs < counted.full_macs
    supernet = ofadiff.Supernet(denoiser, groups, alike, counted)
    supernet.set_size(0.92)
    assert count_macs(denoiser, recordings) == pytest.approx(counted[0].macs, rel=1e-6)


@pytest.mark.parametrize("kind", ["lumina2", "sd_img2img"])
def test_joining_is_tried_in_the_precision_of_the_model(kind, saved, load, tmp_path):
    pipeline = load(kind)
    options = {"component": COMPONENT[kind], "image_dir": saved(kind), "progress": False}
    recordings = ofadiff.record(pipeline, CALLS[kind], tmp_path, 2, **options)
    half = [
        replace(call, args=(), kwargs=in_dtype(call.arguments, torch.bfloat16, call.time), dtype=torch.bfloat16)
        for call in recordings
    ]
    denoiser = pipeline.components[COMPONENT[kind]]
    assert can_be_joined(denoiser, half) is can_be_joined(denoiser, list(recordings)) is True


def test_what_a_run_on_recordings_does_not_take_is_named(saved, load, tmp_path):
    folder, out = saved("latte"), tmp_path / "ofa"
    for extra, message in [
        (["--criterion", "taylor"], "ranks by the loss, which is zero against the original's own answers"),
        (["--snr_gamma", "5"], "--snr_gamma is for models that are trained on images; this run has recordings"),
        (
            ["--train_data_dir", "images"],
            r"images \(--train_data_dir, .* of what can be trained on them; .* is a LattePipeline",
        ),
        (["--component", "vae"], "component is 'vae', which is no denoiser of this LattePipeline"),
        (["--call_arguments", "height"], "--call_arguments height: write NAME=VALUE"),
        (["--call_arguments", "hight=16"], "call 1 has the argument 'hight', which LattePipeline does not take"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(make_app(), words_of(folder, out, *extra))
    changed = load("latte")
    with torch.no_grad():
        changed.transformer.proj_out.bias += 1
    ofadiff.record(changed, CALLS["latte"][:2], tmp_path / "other", progress=False)
    words = words_of(folder, out, "--recordings_dir", str(tmp_path / "other"))
    words[3:5] = []  # without calls: what is there is taken
    with pytest.raises(ValueError, match="was recorded of another model: its weights is SHA-256"):
        call(make_app(), words)
    assert not out.exists()


def test_a_package_that_a_pipeline_needs_is_named(saved, tmp_path, monkeypatch):
    """diffusers has a class in place of a pipeline whose packages are not installed."""
    for kind, name, absent in (("latte", "LattePipeline", ["nowhere"]), ("wan", "WanPipeline", ["nowhere", "nothing"])):
        monkeypatch.setattr(diffusers, name, DummyObject(name, (), {"_backends": ["torch", *absent]}))
        needed = f"names a {name}, which needs {' and '.join(absent)}: pip install {' '.join(absent)}"
        with pytest.raises(ValueError, match=needed):
            call(make_app(), words_of(saved(kind), tmp_path / "ofa", "--component", "transformer"))
        assert not (tmp_path / "ofa").exists()


@pytest.mark.slow
def test_two_processes_share_the_calls(saved, load, tmp_path):
    folder = saved("latte")
    words = ["record", "--pretrained_model_name_or_path", str(folder / "pipeline"), "--steps_per_call", "2"]
    words += ["--calls_file", str(folder / "calls.jsonl"), "--output_dir", str(tmp_path / "two")]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "ofadiff", *words]
    done = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    ofadiff.record(pipeline, CALLS["latte"], tmp_path / "one", 2, progress=False)
    files = sorted((tmp_path / "one" / "calls").iterdir())
    assert len(files) == len(CALLS["latte"])
    assert all(file.read_bytes() == (tmp_path / "two" / "calls" / file.name).read_bytes() for file in files)

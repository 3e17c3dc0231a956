"""Healing and evaluating a checkpoint with calls and recordings alone."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from recordings.tiny_pipelines import CALLS
from safetensors.torch import load_file
from torch import nn

import ofadiff
from ofadiff import OFAPipeline, evaluate, find_channel_groups
from ofadiff.adapters import SizeAdapter
from ofadiff.commands.app import make_app
from ofadiff.commands.command import call
from ofadiff.evaluation import register_extractor
from ofadiff.evaluation.called import Frames, in_a_row
from ofadiff.evaluation.metrics.consistency import mean_psnr, mean_ssim
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.metric import Subject
from ofadiff.evaluation.sampling import Sampling
from ofadiff.recordings import Recordings
from ofadiff.unet_elastic import verify_groups

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning"),
    pytest.mark.filterwarnings("ignore:more than 0.5% of the full model:UserWarning"),
]

TINY = "--max_train_steps 2 --train_batch_size 2 --validation_samples 2 --validation_fraction 0.3 --lr_warmup_steps 0"
QUICK = {"num_samples": 2, "num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def latte(saved, tmp_path_factory):
    """Folder of a text-to-video pipeline, its calls, a checkpoint `ofa` of it and the recordings of the original."""
    folder, out = saved("latte"), tmp_path_factory.mktemp("latte")
    words = f"compress --pretrained_model_name_or_path {folder / 'pipeline'} --calls_file {folder / 'calls.jsonl'} "
    words += f"{TINY} --importance_samples 4 --correction_samples 4 --steps_per_call 1 "
    words += f"--sizes 0.8 1.0 --output_dir {out / 'ofa'}"
    call(make_app(), words.split())
    return folder, out


def heal(latte, out, *extra, checkpoint=None):
    folder, made = latte
    words = f"heal --pretrained_model_name_or_path {checkpoint or made / 'ofa'} --size 0.8 {TINY} --steps_per_call 1 "
    words += f"--calls_file {folder / 'calls.jsonl'} --output_dir {out}"
    return call(make_app(), [*words.split(), *extra])


def test_a_size_is_healed_on_recordings_of_the_checkpoint(latte, tmp_path):
    heal(latte, tmp_path / "healed", "--lora_rank", "2")
    recordings = Recordings(f"{tmp_path / 'healed'}-full-size-recordings")
    full = OFAPipeline.from_pretrained(latte[1] / "ofa")
    assert torch.equal(recordings[0].replay(full.transformer)[0], recordings[0].answer[0])
    adapted = OFAPipeline.from_pretrained(tmp_path / "healed").supernet.size_adapters
    assert list(adapted) == [0.8]

    # With an adapter the full size answers otherwise, so what was recorded before cannot teach for it.
    small = full.extract("largest").transformer
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), small)
    full.supernet.set_size_adapter("largest", SizeAdapter.from_model(small))
    full.save_pretrained(tmp_path / "adapted")
    adapted = {"checkpoint": tmp_path / "adapted"}
    with pytest.raises(ValueError, match=r"recorded of another model: its weights .* with an adapter of SHA-256"):
        heal(latte, tmp_path / "other", "--recordings_dir", str(recordings.folder), **adapted)
    heal(latte, tmp_path / "again", "--feature_distill_weight", "0.1", **adapted)
    recordings = Recordings(f"{tmp_path / 'again'}-full-size-recordings")
    assert torch.equal(recordings[0].replay(full.transformer)[0], recordings[0].answer[0])


def test_a_size_is_healed_on_recordings_of_the_original(latte, tmp_path):
    folder, made = latte
    teacher = ["--teacher_model_name_or_path", str(folder / "pipeline")]
    recorded = ["--recordings_dir", str(made / "ofa-recordings"), "--feature_distill_weight", "0.1"]
    before = {file: file.read_bytes() for file in (made / "ofa-recordings").rglob("*.safetensors")}
    heal(latte, tmp_path / "small", *teacher, *recorded)
    assert before == {file: file.read_bytes() for file in (made / "ofa-recordings").rglob("*.safetensors")}
    plain = DiffusionPipeline.from_pretrained(tmp_path / "small")
    assert type(plain.transformer).__name__ == "OFALatteTransformer3DModel"
    with pytest.raises(
        ValueError, match="was recorded of another model: its weights is SHA-256"
    ):  # the checkpoint did not answer these
        heal(latte, tmp_path / "other", *recorded[:2])
    assert not (tmp_path / "other").exists()


def test_resumed_runs_on_recordings_end_with_the_same_weights(latte, saved, tmp_path):
    folder = saved("latte")
    words = f"compress --pretrained_model_name_or_path {folder / 'pipeline'} --calls_file {folder / 'calls.jsonl'} "
    words += "--train_batch_size 2 --importance_samples 4 --correction_samples 4 --validation_fraction 0 "
    words += "--steps_per_call 1 --sizes 0.8 1.0 "
    words += f"--lr_scheduler constant_with_warmup --lr_warmup_steps 0 --recordings_dir {tmp_path / 'r'} "
    words += "--checkpointing_steps 2 --max_train_steps"
    call(make_app(), [*words.split(), "4", "--output_dir", str(tmp_path / "whole")])
    call(make_app(), [*words.split(), "2", "--output_dir", str(tmp_path / "part")])
    part = [*words.split(), "4", "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", "latest"]
    call(make_app(), part)
    one, other = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("whole", "part")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_report_on_calls_and_recordings(latte, tmp_path):
    folder, made = latte
    words = f"evaluate --checkpoint {made / 'ofa'} --teacher {folder / 'pipeline'} --num_samples 4 "
    words += (
        f"--num_inference_steps 2 --calls_file {folder / 'calls.jsonl'} --recordings_dir {made / 'ofa-recordings'} "
    )
    words += f"--metrics macs psnr answer_error --output_dir {tmp_path / 'report'}"
    report = call(make_app(), words.split())
    teacher, full, small = report.rows
    assert teacher.values["answer_error"] < 1e-10 < full.values["answer_error"] < small.values["answer_error"]
    assert small.values["macs"] < full.values["macs"] == teacher.values["macs"]
    assert small.values["psnr"] < full.values["psnr"] + 10
    frames = CALLS["latte"][0].get("video_length", 4)
    assert report.images[small.key].shape[-1] == frames * report.images[small.key].shape[-2]
    protocol = json.loads((tmp_path / "report" / "report.json").read_text())["protocol"]
    assert protocol["resolution"].startswith(f"{frames} frames of") and protocol["calls"] == len(CALLS["latte"])


def test_recordings_alone_need_no_samples(latte, monkeypatch):
    folder, made = latte
    monkeypatch.setattr("ofadiff.evaluation.evaluator.draw_share", None)  # nothing is drawn
    pipeline, recordings = OFAPipeline.from_pretrained(made / "ofa"), Recordings(made / "ofa-recordings")
    report = evaluate(pipeline, recordings=recordings, **QUICK)
    assert {"macs", "latency", "answer_error"} <= report.columns.keys() and "psnr" not in report.columns
    assert not report.images
    with pytest.raises(ValueError, match="'psnr' cannot be measured"):
        evaluate(pipeline, recordings=recordings, metrics=["psnr"], **QUICK)
    other = ofadiff.record(
        DiffusionPipeline.from_pretrained(folder / "pipeline"), CALLS["latte"][:1], made / "one", progress=False
    )
    other.description["pipeline"] = "WanPipeline"
    with pytest.raises(ValueError, match="was recorded of another model: its pipeline is WanPipeline"):
        evaluate(pipeline, recordings=other, **QUICK)


def test_calls_that_cannot_be_evaluated_are_named(latte):
    pipeline = OFAPipeline.from_pretrained(latte[1] / "ofa")
    for calls, message in [
        ([{"prompt": ["a", "b"]}], "call 1 has 2 prompts; a call that is evaluated has one"),
        ([{"prompt": "a"}, {"prompt": "b", "video_length": 8}], "call 2 has video_length 8, call 1 None; calls of one"),
        ([{"prompt": "a", "size": 0.8}], "call 1 has the argument 'size'; an evaluation sets it itself"),
        ([{"prompt": "a", "colour": 1}], "call 1 has the argument 'colour', which LattePipeline does not take"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, calls=calls, **QUICK)
    with pytest.raises(ValueError, match=r"calls and arguments .* exclude each other"):
        evaluate(pipeline, calls=["a"], arguments={"prompt": ["a"]}, **QUICK)


def test_a_call_is_sampled_as_its_user_would(latte):
    pipeline = OFAPipeline.from_pretrained(latte[1] / "ofa")
    pipeline.set_progress_bar_config(disable=True)
    calls = [{**CALLS["latte"][0], "num_inference_steps": 2}]
    drawn = Sampling.of(pipeline, 3, 50, None, None, calls).draw_frames(pipeline, [4])
    by_hand = pipeline(**calls[0], generator=torch.Generator().manual_seed(7), output_type="pt").frames
    assert torch.equal(drawn[0], (by_hand[0].float() * 255).round().to(torch.uint8))
    assert torch.equal(Frames(in_a_row(drawn[0]).unsqueeze(0), drawn.shape[1])[2], drawn[0, 2])


class Pixels(nn.Module):
    def forward(self, images):
        return images.flatten(1).float()


def test_every_frame_of_a_video_counts_by_itself():
    """Frames of other sizes and in other numbers: a video measures as its frames do alone."""
    register_extractor("pixels", Pixels())
    for frames, side in ((4, 16), (3, 24)):
        generator = torch.Generator().manual_seed(frames)
        ours, theirs = (torch.randint(256, (6, frames, 3, side, side), generator=generator).byte() for _ in range(2))
        alone = {"images": ours.flatten(0, 1), "teacher_images": theirs.flatten(0, 1), "frames": 1}
        strips = {
            "images": torch.stack([in_a_row(video) for video in ours]),
            "teacher_images": torch.stack([in_a_row(video) for video in theirs]),
            "frames": frames,
        }
        extractor = FeatureExtractor("pixels")
        both = [
            Subject(denoiser=None, arguments={}, gather=lambda values: values, extractor=extractor, **given)
            for given in (alone, strips)
        ]
        assert torch.equal(both[0].features, both[1].features)
        for measure in (mean_psnr, mean_ssim):
            (one,), (other,) = (measure(subject).values() for subject in both)
            assert one == pytest.approx(other, rel=1e-6)


def test_pipelines_of_something_else_are_named_and_measured_on_recordings(saved, load, tmp_path):
    latte, svd, audio = load("latte"), load("svd"), load("audioldm2")
    with pytest.raises(ValueError, match="this LattePipeline gives no images; sample videos with calls"):
        shape = {name: CALLS["latte"][0][name] for name in ("video_length", "height", "width")}
        options = {"arguments": {"prompt": ["a"]}, "call_arguments": shape, "metrics": ["psnr"]}
        evaluate(latte, teacher=latte, **options, **QUICK)
    with pytest.raises(ValueError, match="this StableVideoDiffusionPipeline needs the argument 'image'; give calls"):
        evaluate(svd, metrics=["psnr"], teacher=svd, **QUICK)
    with pytest.raises(ValueError, match="gives neither one image nor one video; give recordings alone"):
        evaluate(audio, calls=CALLS["audioldm2"][:1], metrics=["psnr"], teacher=audio, **QUICK)
    for kind, pipeline in (("svd", svd), ("audioldm2", audio)):
        options = {"component": "unet", "image_dir": saved(kind), "progress": False}
        recordings = ofadiff.record(pipeline, CALLS[kind][:1], tmp_path / kind, 1, **options)
        (row,) = evaluate(pipeline, recordings=recordings, metrics=["macs", "answer_error"], **QUICK).rows
        assert row.values["answer_error"] < 1e-10 and row.values["macs"] > 0


def test_images_that_differ_in_size_are_named(saved, load, tmp_path):
    pipeline = load("sd_img2img")
    Image.new("RGB", (48, 64)).save(tmp_path / "narrow.png")
    calls = [{"prompt": "a", "image": image} for image in (saved("sd_img2img") / "image.png", tmp_path / "narrow.png")]
    with pytest.raises(ValueError, match=r"calls gave samples of \(1, 3, 64, 64\) and \(1, 3, 64, 48\)"):
        evaluate(pipeline, teacher=pipeline, calls=calls, metrics=["psnr"], **QUICK)


def test_a_denoiser_is_not_recorded_at_a_small_size(latte, tmp_path):
    pipeline = OFAPipeline.from_pretrained(latte[1] / "ofa")
    calls = [{**CALLS["latte"][0], "size": 0.8}]
    with pytest.raises(ValueError, match=r"would be recorded at size 0\.8; other sizes learn from its largest"):
        ofadiff.record(pipeline, calls, tmp_path / "r")
    pipeline.set_size("smallest")
    with pytest.raises(ValueError, match=r"would be recorded at size 0\.8"):
        ofadiff.record(pipeline, CALLS["latte"], tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_groups_are_verified_on_a_recorded_call(latte, saved):
    recordings = Recordings(latte[1] / "ofa-recordings")
    model = DiffusionPipeline.from_pretrained(saved("latte") / "pipeline").transformer
    groups = find_channel_groups(model)
    assert verify_groups(model, groups, recordings).keys() == {group.name for group in groups}
    assert verify_groups(model, groups[:1], recordings[1]).keys() == {groups[0].name}

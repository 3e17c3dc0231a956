import math

import numpy as np
import pytest
import torch
from conftest import make_unet, plain_unet
from diffusers import DDPMScheduler, DiffusionPipeline
from evaluation.random_images import random_images
from PIL import Image

from ofadiff import evaluate
from ofadiff.evaluation import METRICS, generate
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.fid import frechet_distance
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.profiling.cost import count_macs, count_parameters

QUICK = {"num_samples": 8, "num_inference_steps": 2, "extractor": "tiny", "progress": False, "num_shown": 3}


@pytest.fixture(scope="module")
def reference():
    return random_images(20, channels=1)


@pytest.fixture(scope="module")
def report(pipeline, teacher, reference):
    return evaluate(pipeline, reference=reference, teacher=teacher, command="make report", **QUICK)


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr("ofadiff.evaluation.sampling.Sampling.draw_frames", refuse)


def test_there_is_a_row_per_model_with_every_metric(report):
    assert [(row.label, row.size) for row in report.rows] == [("teacher", None), ("1.0", 1.0), ("0.5", 0.5)]
    absent = ("clip_score", "answer_error")  # there are no prompts, and no recordings
    columns = {column for name, metric in METRICS.items() if name not in absent for column in metric.columns}
    assert set(report.columns) == {"reached", "params"} | columns
    for row in report.rows:
        missing = {name for name in report.columns if row.values[name] is None}
        assert missing == ({"psnr", "ssim"} if row is report.teacher else set())
        assert all(math.isfinite(value) for value in row.values.values() if value is not None)


def test_costs_are_those_of_the_extracted_model(report, pipeline, teacher):
    small = pipeline.extract(0.5).unet
    row, full = report.rows[2].values, count_parameters(teacher.unet)
    assert row["params"] == count_parameters(small) and row["macs"] == count_macs(small)
    assert row["reached"] == pytest.approx(0.5, abs=0.005) and row["reached"] == row["params"] / full
    assert report.teacher.values["params"] == full
    assert row["memory"] < report.teacher.values["memory"]


def test_quality_is_that_of_the_same_seeds(report, pipeline, reference):
    full, small = report.rows[1].values, report.rows[2].values
    assert full["psnr"] > 40 > small["psnr"] and full["ssim"] > 0.99 > small["ssim"]
    images = generate(pipeline.extract(0.5), 8, num_inference_steps=2)
    assert torch.equal(report.images["0.5"], images[:3])
    extractor = FeatureExtractor("tiny")
    found = frechet_distance(extractor.features(images), extractor.features(reference.expand(-1, 3, -1, -1)))
    assert small["fid"] == pytest.approx(found, rel=1e-6)


def test_the_protocol_says_how(report):
    protocol = report.protocol
    assert protocol["samples per size"] == 8 and protocol["denoising steps"] == 2
    assert protocol["features"] == "tiny" and protocol["reference images"] == 20
    assert protocol["scheduler"] == "DDIMScheduler" and protocol["command"] == "make report"
    assert torch.__version__ in protocol["versions"]


def test_images_alone_are_sampled_for_costs_alone(pipeline):
    report = evaluate(pipeline, metrics=["macs"], sizes=[0.5], **QUICK)
    assert list(report.columns) == ["reached", "params", "macs"]
    assert [row.label for row in report.rows] == ["0.5"] and len(report.images["0.5"]) == 3


def test_a_size_in_latency_is_no_share_of_parameters(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.subnets, "budget", "latency")
    report = evaluate(pipeline, metrics=["macs"], sizes=[0.5], **QUICK)
    assert list(report.columns) == ["params", "macs"] and report.protocol["budget"] == "latency"


def test_a_plain_pipeline_has_one_row(pipeline, teacher):
    report = evaluate(pipeline.extract(0.5), teacher=teacher, metrics=["psnr"], **QUICK)
    assert [row.label for row in report.rows] == ["teacher", "model"]
    assert report.rows[1].values["reached"] == pytest.approx(0.5, abs=0.005)


def test_other_pipelines_stand_beside_the_sizes(pipeline, teacher):
    compare = {"not trained": pipeline, "cut": pipeline.extract(0.5)}
    report = evaluate(pipeline, teacher=teacher, compare=compare, sizes=[0.5], metrics=["psnr"], **QUICK)
    rows = [(row.series, row.label, row.size) for row in report.rows]
    assert rows[:2] == [("teacher", "teacher", None), ("OFA", "0.5", 0.5)]
    assert rows[2:] == [("not trained", "0.5", 0.5), ("cut", "model", None)]
    _, own, *others = report.rows
    for row in others:
        assert row.values["psnr"] == own.values["psnr"] and row.values["reached"] == own.values["reached"]
    assert set(report.images) == {"teacher", "0.5", "not trained/0.5", "cut/model"}


def test_a_tensor_of_references_is_resized_too(pipeline, reference):
    options = {"metrics": ["fid"], "sizes": [0.5], **QUICK}
    double = reference.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    same, other = (evaluate(pipeline, reference=images, **options) for images in (reference, double))
    # Twice every pixel, and half of that again: the filter blurs a little.
    assert other.rows[0].values["fid"] == pytest.approx(same.rows[0].values["fid"], rel=0.1)
    assert other.protocol["reference resized"].startswith("centre crop, then Pillow's bicubic")
    assert other.protocol["resized for the features"] == "its own"


def test_reference_images_of_a_folder_are_resized(pipeline, tmp_path):
    for index, image in enumerate(random_images(6, size=32)):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "deep" / f"{index}.png")
    report = evaluate(pipeline, reference=tmp_path, metrics=["fid"], sizes=[1.0], **QUICK)
    assert report.protocol["reference images"] == 6 and report.rows[0].values["fid"] > 0


@pytest.mark.usefixtures("no_sampling")
def test_what_cannot_work_is_said_before_sampling(pipeline, teacher, reference, tmp_path):
    def fails(match, pipeline=pipeline, **options):
        with pytest.raises(ValueError, match=match):
            evaluate(pipeline, **{**QUICK, **options})

    fails(
        "metric is 'speed'; it must be one of macs, latency, memory, fid, kid, mind, precision, recall, clip_score",
        metrics=["speed"],
    )
    fails("'fid' cannot be measured: there are no reference images", metrics=["fid"])
    fails("'ssim' cannot be measured: there is no teacher", metrics=["ssim"])
    fails(r"size is 0\.3; it must be one of 0\.5, 1", sizes=[0.3])
    fails(r"sizes is empty; choose some of 0\.5, 1", sizes=[])
    other = {"compare": {"other": ClassConditionalDDPMPipeline(teacher.unet, DDPMScheduler())}}
    fails("the 'other' samples with DDPMScheduler, the pipeline with DDIMScheduler", **other)
    fails("'a/b' cannot be the name of a pipeline to compare with", compare={"a/b": pipeline})
    fails("'OFA' cannot be the name", compare={"OFA": pipeline})
    fails("save_reference_statistics needs reference images", save_reference_statistics=tmp_path / "real.safetensors")
    fails("num_shown is 0; it must be a whole number of at least 1", num_shown=0)
    statistics = FeatureStatistics(torch.zeros(6), torch.eye(6), 9, "other", "none", "16x16")
    statistics.save(tmp_path / "statistics" / "real.safetensors")
    fails("are those of the extractor 'other', not 'tiny'", reference=tmp_path / "statistics" / "real.safetensors")
    fails("extractor is 'nothing'", reference=reference, extractor="nothing")
    fails("8 samples and 3 reference images; FID and KID take 4 of each", reference=reference[:3])
    few = "8 samples and 20 reference images; precision and recall with prc_neighborhood 8 take 9 of each"
    fails(few, reference=reference, prc_neighborhood=8)
    few = "8 samples and 4 reference images; recall with prc_neighborhood 5 takes 6 of each"
    fails(few, reference=reference[:4], metrics=["recall"], prc_neighborhood=5)
    fails(r"reference images are torch\.float32", reference=reference.float())
    fails(r"shape \(20, 16, 16\); it must be \(N, 3, H, W\)", reference=reference[:, 0])
    fails("ClassConditionalDDPMPipeline is no OFAPipeline", pipeline=teacher, sizes=[0.5])
    (tmp_path / "broken.png").write_bytes(b"no image")
    fails("1 of 1 images cannot be read: .*broken.png", reference=tmp_path)
    other = ClassConditionalDDPMPipeline(teacher.unet, DDPMScheduler())
    fails("the teacher samples with DDPMScheduler, the pipeline with DDIMScheduler", teacher=other)


def test_what_the_trial_images_tell_is_said_before_sampling(pipeline, teacher, monkeypatch, tmp_path):
    monkeypatch.setattr("ofadiff.evaluation.evaluator.draw_share", None)
    np.savez(tmp_path / "real.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="are of 5 features, the extractor has 6"):
        evaluate(pipeline, reference=tmp_path / "real.npz", **QUICK)
    unet = plain_unet(in_channels=1, out_channels=1, num_class_embeds=10, sample_size=8)
    other = ClassConditionalDDPMPipeline(unet, pipeline.scheduler)
    with pytest.raises(ValueError, match="teacher makes images of 16x16 pixels, small/model of 8x8"):
        evaluate(pipeline, teacher=teacher, sizes=[0.5], compare={"small": other}, metrics=["psnr"], **QUICK)
    with pytest.raises(ValueError, match="images are 8x8; SSIM takes at least 11 pixels"):
        evaluate(other, teacher=other, metrics=["ssim"], **QUICK)


class NoDenoiser(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_a_pipeline_without_a_known_denoiser_is_an_error(pipeline):
    with pytest.raises(ValueError, match="this NoDenoiser has no denoiser among its components scheduler"):
        evaluate(NoDenoiser(pipeline.scheduler), **QUICK)
    unknown = ClassConditionalDDPMPipeline(make_unet("plain").mid_block, pipeline.scheduler)
    with pytest.raises(ValueError, match="'macs' cannot be measured: no example inputs are known for UNetMidBlock2D"):
        evaluate(unknown, metrics=["macs"], **QUICK)

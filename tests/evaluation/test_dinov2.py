"""FD-DINOv2 through torch-fidelity's own extractor; in place of the published weights a tiny model of a local hub."""

import os
from urllib.error import URLError

import pytest
import torch
from evaluation.random_images import random_images

from ofadiff import evaluate
from ofadiff.evaluation import generate, register_extractor
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.fid import frechet_distance

HUB = """
import torch

class Means(torch.nn.Module):
    def forward(self, images):
        assert images.shape[1:] == (3, 224, 224), images.shape
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

def dinov2_vitl14():
    return Means()
"""
QUICK = {"num_samples": 8, "num_inference_steps": 2, "progress": False, "num_shown": 2, "sizes": [0.5]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on disk; what was asked of it."""
    (tmp_path / "hubconf.py").write_text(HUB)
    load, asked = torch.hub.load, []

    def load_from_disk(repository, model):
        asked.append((repository, model))
        return load(tmp_path, model, source="local")

    monkeypatch.setattr(torch.hub, "load", load_from_disk)
    monkeypatch.setitem(os.environ, "XFORMERS_DISABLED", "1")  # torch-fidelity sets it
    return asked


def test_it_is_the_large_one_on_normalized_images(hub):
    extractor = FeatureExtractor("dinov2")
    assert hub == [("facebookresearch/dinov2", "dinov2_vitl14")] and extractor.name == "dinov2-vit-l-14"
    found = extractor.features(torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)).view(2, 3, 4)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((128 / 255 - mean) / deviation)[None, :, None]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("hub")
def test_the_report_has_fd_dinov2(pipeline, tmp_path):
    reference = random_images(20)
    names = ["fid", "kid", "mind", "precision", "recall"]
    report = evaluate(pipeline, reference=reference, metrics=names, extractor="dinov2", **QUICK)
    titles = [report.columns[name].title for name in names]
    assert titles == ["FD-DINOv2", "KD-DINOv2", "MIND", "precision", "recall"]
    assert report.protocol["features"] == "dinov2-vit-l-14"
    extractor = FeatureExtractor("dinov2")
    ours = extractor.features(generate(pipeline.extract(0.5), 8, num_inference_steps=2))
    expected = frechet_distance(ours, extractor.features(reference))
    assert report.rows[0].values["fid"] == pytest.approx(expected, rel=1e-6)
    report.write(tmp_path / "report")
    assert "FD-DINOv2" in report.table() and "FD-DINOv2" in (tmp_path / "report" / "report.html").read_text()
    inception = evaluate(pipeline, reference=reference, metrics=["fid"], extractor="tiny", **QUICK)
    assert inception.columns["fid"].title == "FID"


def test_weights_that_cannot_be_had_are_one_error_before_sampling(pipeline, monkeypatch, tmp_path):
    def unreachable(*args, **options):
        raise URLError("no network")

    def refuse(*args, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(os.environ, "XFORMERS_DISABLED", "1")
    monkeypatch.setattr("ofadiff.evaluation.sampling.Sampling.draw_frames", refuse)
    message = r"weights of the extractor 'dinov2' cannot be loaded from torch.hub's facebookresearch/dinov2: .*internet"
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, reference=random_images(20), metrics=["fid"], extractor="dinov2", **QUICK)


def test_its_name_is_taken():
    with pytest.raises(ValueError, match="'dinov2' is one of torch-fidelity's own"):
        register_extractor("dinov2", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"extractor is 'dinov3'; it must be one of inception, dinov2, .*dinov2-vit"):
        FeatureExtractor("dinov3")

"""FID over several seeds: mean and spread, each set the one that its seed gives."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from evaluation.random_images import random_images

from ofadiff import evaluate
from ofadiff.commands.evaluate import Measured, ReferenceImages, ReportFiles, Samples, check, evaluation_settings
from ofadiff.evaluation import Report, generate
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.fid import FID, frechet_distance, over_seeds
from ofadiff.evaluation.report.quality_plot import quality_plot
from ofadiff.evaluation.report.rows import PARAMETERS, Row
from ofadiff.evaluation.sampling import Sampling

QUICK = {"num_samples": 8, "num_inference_steps": 2, "extractor": "tiny", "progress": False, "num_shown": 2}
OPTIONS = {"metrics": ["fid", "mind"], "sizes": [0.5], **QUICK}


@pytest.fixture(scope="module")
def reference():
    return random_images(20, channels=1)


@pytest.fixture(scope="module")
def report(pipeline, reference):
    return evaluate(pipeline, reference=reference, fid_seeds=3, seed=5, **OPTIONS)


def test_seeds_that_agree_have_no_spread():
    assert over_seeds([3.7]) == {"fid": 3.7}
    assert over_seeds([3.5, 3.5, 3.5]) == {"fid": 3.5, "fid_std": 0, "fid_1": 3.5, "fid_2": 3.5, "fid_3": 3.5}
    assert over_seeds([1.0, 2.0, 3.0])["fid_std"] == 1


def test_each_set_is_that_of_its_seeds(report, pipeline, reference):
    extractor, values = FeatureExtractor("tiny"), report.rows[0].values
    real = extractor.features(reference.expand(-1, 3, -1, -1))
    each = []
    for seed in (5, 13, 21):
        images = generate(pipeline.extract(0.5), 8, seed=seed, num_inference_steps=2)
        each.append(frechet_distance(extractor.features(images), real))
    assert [values[f"fid_{number}"] for number in (1, 2, 3)] == pytest.approx(each, rel=1e-6)
    assert values["fid"] == pytest.approx(np.mean(each), rel=1e-6)
    assert values["fid_std"] == pytest.approx(np.std(each, ddof=1), rel=1e-6) and values["fid_std"] > 0


def test_every_file_shows_the_spread(report, tmp_path):
    report.write(tmp_path)
    values = report.rows[0].values
    shown = f"{values['fid']:.2f} ± {values['fid_std']:.2f}"
    assert shown in report.table()
    assert shown in (tmp_path / "report.md").read_text() and shown in (tmp_path / "report.html").read_text()
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]["values"]
    assert (row["fid"], row["fid_std"]) == (values["fid"], values["fid_std"]) and row["fid_3"] == values["fid_3"]
    assert Report.from_json(tmp_path / "report.json") == report
    assert report.protocol["FID"].startswith("mean ± standard deviation over 3 sets of 8 samples, seeds 5 to 28;")


def test_one_seed_is_all_that_is_drawn_by_default(report, pipeline, reference, tmp_path):
    plain = evaluate(pipeline, reference=reference, seed=5, samples_dir=tmp_path, **OPTIONS)
    several, one = report.rows[0].values, plain.rows[0].values
    assert not any(name.startswith("fid_") for name in one) and "FID" not in plain.protocol
    assert one["fid"] == several["fid_1"] and one["mind"] == several["mind"]
    assert "±" not in plain.table()
    assert [path.name for path in tmp_path.iterdir()] == ["0.5"] and len([*tmp_path.rglob("*.png")]) == 8


def test_sets_are_kept_and_gone_on_from(report, pipeline, reference, tmp_path, monkeypatch):
    draw, drawn = Sampling.draw_frames, []

    def counted(self, pipeline, indices, *args, **options):
        drawn.append((self.seed, *indices))
        return draw(self, pipeline, indices, *args, **options)

    monkeypatch.setattr(Sampling, "draw_frames", counted)
    options = {"reference": reference, "seed": 5, "samples_dir": tmp_path, **OPTIONS}
    evaluate(pipeline, **options)
    assert drawn == [(5, 0), (5, *range(8))]  # the trial, then the samples
    drawn.clear()
    more = evaluate(pipeline, fid_seeds=3, **options)
    assert drawn == [(5, 0), (13, *range(8)), (21, *range(8))]
    assert more.rows[0].values == report.rows[0].values
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.5", "seed=13", "seed=21"]
    drawn.clear()
    evaluate(pipeline, fid_seeds=3, **options)
    assert drawn == [(5, 0)]
    shutil.rmtree(tmp_path / "seed=13")
    (tmp_path / "seed=21").rename(tmp_path / "seed=13")
    with pytest.raises(ValueError, match=r"seed=13/0\.5 were made with first seed 21, not 13"):
        evaluate(pipeline, fid_seeds=2, **options)


def test_the_command_passes_it_on_and_refuses_it_before_models_are_loaded(checkpoint, tmp_path):
    measured, files = Measured(checkpoint=str(checkpoint / "ofa")), ReportFiles(output_dir=str(tmp_path / "out"))
    samples, nothing = Samples(fid_seeds=3), ReferenceImages(prc_neighborhood=7, extractor="tiny")
    settings = evaluation_settings(nothing, samples, files, "")
    assert (settings.fid_seeds, settings.prc_neighborhood) == (3, 7)
    with pytest.raises(ValueError, match="fid_seeds is 3, but FID is not measured"):
        check(measured, measured.checkpoint, nothing, samples, files)
    check(measured, measured.checkpoint, nothing, replace(samples, fid_seeds=1), files)
    with pytest.raises(ValueError, match="--fid_seeds"):
        Samples(fid_seeds=0)
    with pytest.raises(ValueError, match="--prc_neighborhood"):
        ReferenceImages(prc_neighborhood=0)


def test_the_plot_has_a_bar_for_the_spread():
    columns = {"params": PARAMETERS, **FID.columns}
    rows = [Row("0.5", size=0.5, values={"params": 10.0, "fid": 3.0}), Row("1.0", size=1.0, values={"params": 20.0})]
    plain = Report("", columns, rows)
    before = quality_plot(plain)
    assert quality_plot(plain) == before
    rows[0].values["fid_std"] = 0.5
    assert quality_plot(plain) != before

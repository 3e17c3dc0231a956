"""Rows of calls of the supernet itself: with a schedule of sizes, or guided by a small one."""

import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDIMScheduler, DDPMPipeline

from ofadiff import OFAPipeline, SizeSchedule, evaluate
from ofadiff.commands.evaluate import variants_of
from ofadiff.evaluation import generate
from ofadiff.evaluation.report.rows import VARIANTS

QUICK = {"num_samples": 8, "num_inference_steps": 2, "extractor": "tiny", "progress": False, "num_shown": 3}
AUTO = {"guidance_size": 0.5, "autoguidance_scale": 2.0}


@pytest.fixture
def reference():
    return torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scheduled(tmp_path):
    torch.manual_seed(0)
    unet = plain_unet(in_channels=1, out_channels=1, num_class_embeds=10).eval()
    make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ofa")
    pipeline = OFAPipeline.from_pretrained(tmp_path / "ofa")
    pipeline.set_schedule("fast", SizeSchedule([1.0, 0.5]))
    return pipeline


def test_a_variant_is_a_row_of_its_own_calls(scheduled, reference, tmp_path):
    variants = {"fast": {"size": "fast"}, "by 0.5": AUTO, "small": {"size": 0.5}}
    report = evaluate(scheduled, reference=reference, variants=variants, samples_dir=tmp_path / "samples", **QUICK)
    assert [(row.label, row.series) for row in report.rows[2:]] == [(name, VARIANTS) for name in variants]
    rows = {row.label: row.values for row in report.rows}
    for name in ("fast", "by 0.5"):
        assert rows[name]["fid"] not in (rows["1.0"]["fid"], rows["0.5"]["fid"]) and rows[name]["macs"] is None
    assert rows["small"]["fid"] == pytest.approx(rows["0.5"]["fid"], rel=1e-3)
    alone = generate(scheduled, 3, size=SizeSchedule([1.0, 0.5]), num_inference_steps=2, batch_size=8)
    assert torch.equal(report.images[f"{VARIANTS}/fast"], alone)
    assert report.protocol["variant by 0.5"] == "guidance_size=0.5, autoguidance_scale=2.0"
    report.write(tmp_path / "report")
    assert "| fast |" in (tmp_path / "report" / "report.md").read_text()
    # Kept images are those of the schedule as it was.
    scheduled.set_schedule("fast", SizeSchedule([0.5, 1.0]))
    with pytest.raises(ValueError, match="variant's size"):
        evaluate(scheduled, reference=reference, variants=variants, samples_dir=tmp_path / "samples", **QUICK)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a/b": {"size": 0.5}}, r"'a/b' cannot be the name of a variant"),
        ({"slow": {"size": "slow"}}, r"size is 'slow'; it must be one of 0\.5, 1"),
        ({"half": {"guidance_size": 0.5}}, r"which half of a ClassConditionalDDPMPipeline's guidance"),
    ],
)
def test_a_variant_that_cannot_be_is_an_error_before_sampling(scheduled, reference, variants, message, monkeypatch):
    monkeypatch.setattr("ofadiff.evaluation.evaluator.draw_share", None)
    with pytest.raises(ValueError, match=message):
        evaluate(scheduled, reference=reference, variants=variants, **QUICK)


def test_variants_of_a_plain_pipeline_are_an_error(scheduled):
    with pytest.raises(ValueError, match="variants has 'fast', but the pipeline has no sizes"):
        evaluate(scheduled.extract(0.5), variants={"fast": {"size": 0.5}}, metrics=["macs"])


def test_the_flag_names_the_row_and_its_arguments():
    assert variants_of(["fast:size=fast", "g:guidance_size=0.4,guidance_scale=3"]) == {
        "fast": {"size": "fast"},
        "g": {"guidance_size": 0.4, "guidance_scale": 3},
    }
    for bad in ("fast", "fast:", ":size=1", "fast:size", "fast:size=1,"):
        with pytest.raises(ValueError, match=f"--variants {bad} is not NAME:ARGUMENT=VALUE"):
            variants_of([bad])
    with pytest.raises(ValueError, match="with a name of its own"):
        variants_of(["a:size=1", "a:size=2"])

"""The emoji benchmark from end to end, on pictures of noise and with models of a few steps."""

import json

import emoji
import emoji_judge
import guidance
import pytest
import schedule_fid
import torch
from emoji_models import Recipe
from tiny_stable_diffusion import save_captioned_images

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(monkeypatch):
    setting = emoji.Setting(
        resolution=16,
        clip=Recipe((16,), 2, 8, 1e-3),
        vae=Recipe((8, 8), 2, 8, 1e-3),
        unet=Recipe((16, 32), 2, 8, 1e-3),
        joint=Recipe((), 2, 4, 1e-3),
        sizes=(0.6, 1.0),
        num_samples=6,
        importance_samples=4,
        correction_samples=4,
        validation_samples=4,
    )
    monkeypatch.setitem(emoji.SETTINGS, "cpu", setting)
    for benchmark in (emoji, emoji_judge, guidance, schedule_fid):
        monkeypatch.setattr(benchmark, "INFERENCE_STEPS", 2)
    for benchmark in (emoji, emoji_judge):
        monkeypatch.setattr(benchmark, "read_images", lambda folder, count: torch.rand(count, 3, 16, 16))
    monkeypatch.setattr(emoji, "check_font", lambda font: None)

    def write_noise(folder, font, resolution):
        if not folder.exists():
            save_captioned_images(folder)
        return [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]

    monkeypatch.setattr(emoji, "write_emoji", write_noise)
    return setting


def test_report_has_every_size_beside_the_original_and_the_untrained(tmp_path, tiny, monkeypatch):
    args = emoji.make_parser().parse_args(["--output_dir", str(tmp_path / "run")])
    report = emoji.benchmark(args)
    assert report.teacher is not None
    rows = [report.teacher, *(row for rows in report.series.values() for row in rows)]
    assert [(row.series, row.size) for row in rows[1:]] == [
        *(("OFA", size) for size in (1.0, 0.6)),
        *((emoji.UNTRAINED, size) for size in (1.0, 0.6)),
    ]
    for row in rows:
        assert row.values["fid"] is not None
        assert row.values["clip_score"] is not None
    assert (tmp_path / "run" / "samples.png").exists()
    few = {"tuning_samples": 4, "num_samples": 6, "batch_size": 6, "timed_images": 1}
    guided = guidance.compare(emoji=str(tmp_path / "run"), scales=(2.0, 3.0), autoguidance_scales=(1.5,), **few)
    assert [(row["kind"], row["guidance_size"]) for row in guided] == [
        *(("halves", size) for size in (1.0, 0.6)),
        ("autoguidance", 0.6),
        ("none", 1.0),
    ]
    assert all(row["fid"] is not None and row["ratio"] > 0 for row in guided)
    monkeypatch.setattr(schedule_fid, "CALLS", 2)
    monkeypatch.setattr(schedule_fid, "CAPTIONS", 2)
    scheduled = schedule_fid.compare(emoji=str(tmp_path / "run"), budgets=(0.9,), num_samples=6, batch_size=6)
    assert {row["name"] for row in scheduled} == {"0.6", "1", "schedule 0.9"}
    assert all(row["macs"] <= 0.9 for row in scheduled if row["name"] == "schedule 0.9")


def test_folder_of_another_run_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        emoji.claim(tmp_path, {"setting": "cpu"})
    folder = tmp_path / "run"
    emoji.claim(folder, {"setting": "cpu", "seed": 0})
    emoji.claim(folder, {"setting": "cpu", "seed": 0})
    with pytest.raises(ValueError, match="another setting or seed"):
        emoji.claim(folder, {"setting": "cpu", "seed": 1})


def test_font_has_to_be_one_of_colour_bitmaps(tmp_path):
    from emoji_data import check_font

    with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji"):
        check_font(tmp_path / "none.ttf")

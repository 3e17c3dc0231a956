import json

import pytest
from diffusers import DiffusionPipeline

import ofadiff

pytestmark = pytest.mark.slow


def test_the_demo_leaves_what_it_promises(launch, words, tmp_path):
    options = {
        "output_dir": tmp_path / "demo",
        "teacher_steps": 2,
        "joint_steps": 2,
        "correction_samples": 4,
        "num_samples": 12,
        "validation_samples": 16,
    }
    done = launch("demo.py", words(options))
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    pictures = {"samples.png", "quality_vs_size.png"}
    assert made >= {"ofa", "size-0.5", "size-0.7", "report.html", "report.md", "report.json"} | pictures
    rows = json.loads((tmp_path / "demo" / "report.json").read_text())["rows"]
    assert [row["label"] for row in rows if row["series"] != "not trained jointly"] == [
        *("teacher", "1.0", "0.85", "0.7", "0.6", "0.5", "0.4")
    ]
    assert all(row["values"]["validation_loss"] is not None for row in rows)
    assert len(ofadiff.OFAPipeline.from_pretrained(tmp_path / "demo" / "ofa").sizes) == 6
    assert DiffusionPipeline.from_pretrained(tmp_path / "demo" / "size-0.5").unet.config["ofa_widths"]


def test_a_folder_with_something_in_it_is_refused(recipe, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty; choose another one or remove it"):
        recipe("demo.py", ["--output_dir", str(tmp_path)])

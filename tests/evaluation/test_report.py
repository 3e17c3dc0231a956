import json
import re

import pytest
from evaluation.random_images import random_images
from PIL import Image

from ofadiff.evaluation import VALIDATION_LOSS, Column, Report
from ofadiff.evaluation.report.rows import PARAMETERS, REACHED, TEACHER, Row

FILES = {"report.json", "report.md", "report.html", "samples.png", "quality_vs_size.png"}


@pytest.fixture
def report():
    columns = {
        "reached": REACHED,
        "params": PARAMETERS,
        "latency": Column("latency", "seconds"),
        "fid": Column("FID", better="lower", plotted=True),
        "kid": Column("KID", digits=3, spread="kid_std"),
        "psnr": Column("PSNR, dB"),
    }
    report = Report("Digits & <friends>", columns, protocol={"samples": 8, "command": "make demo"})
    rows = [
        Row(TEACHER, TEACHER, None, {"reached": 1.0, "params": 2_000_000, "latency": 0.02, "fid": 3.0, "psnr": None}),
        Row("1.0", size=1.0, values={"reached": 1.0, "params": 2_000_000, "latency": 0.02, "fid": 3.1, "psnr": 40.0}),
        Row("0.5", size=0.5, values={"reached": 0.501, "params": 1_002_000, "latency": 0.0104, "fid": float("inf")}),
    ]
    rows[2].values.update(kid=0.01, kid_std=0.002)
    for number, row in enumerate(rows):
        report.add_row(row, random_images(4, seed=number))
    return report


def test_values_are_shown_in_one_unit_per_column(report):
    assert report.heading() == ["size", "reached", "parameters, M", "latency, ms", "FID", "KID", "PSNR, dB"]
    assert report.cells(report.rows[2]) == ["0.5", "50.1 %", "1.00", "10.40", "–", "0.010 ± 0.002", "–"]
    assert report.text(report.rows[2], "params") == "1.00 M"
    lines = report.table().splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


def test_json_is_strict_and_comes_back(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(report.to_json())

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["rows"][2]["values"]["fid"] is None  # it was infinite
    assert Report.from_json(path) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"title": 1, "columns": {}, "rows": [{}], "protocol": {}}'])
def test_other_files_are_no_reports(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is no report of ofadiff"):
        Report.from_json(tmp_path / "report.json")


def test_columns_from_elsewhere(report):
    report.add_column("validation_loss", VALIDATION_LOSS, {TEACHER: 0.02, 0.5: 0.03, 1.0: float("nan")})
    assert [row.values["validation_loss"] for row in report.rows] == [0.02, None, 0.03]
    report.add_row(Row("0.5", "untrained", 0.5, {"fid": 90.0}))
    report.add_column("validation_loss", VALIDATION_LOSS, {0.5: 0.4}, series="untrained")
    baseline = report.series["untrained"]
    assert [row.values for row in baseline] == [{"fid": 90.0, "validation_loss": 0.4}]
    assert report.rows[2].values["validation_loss"] == 0.03
    assert report.table().splitlines()[-2:][0] == "untrained"
    with pytest.raises(ValueError, match=r"no row 0\.7 of 'OFA'; its rows: teacher, 1\.0, 0\.5"):
        report.add_column("validation_loss", VALIDATION_LOSS, {0.7: 0.1})


def test_all_files_are_written(report, tmp_path):
    report.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == FILES
    assert Report.from_json(folder / "report.json") == report
    markdown = (folder / "report.md").read_text()
    assert "| 0.5 | 50.1 % | 1.00 | 10.40 |" in markdown
    assert "(samples.png)" in markdown and "(quality_vs_size.png)" in markdown
    with Image.open(folder / "samples.png") as grid:
        # Three rows and four columns of 16-pixel images, each enlarged to 64, and margins.
        assert grid.height >= 3 * 64 and grid.width >= 4 * 64
        left = grid.width - 16 - 4 * 64 - 3 * 4
        tile = grid.crop((left, 16, left + 64, 16 + 64)).resize((16, 16), Image.Resampling.NEAREST)
        assert list(tile.tobytes()) == report.images[TEACHER][0].permute(1, 2, 0).flatten().tolist()


def test_the_page_needs_nothing_else_and_escapes_text(report, tmp_path):
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Digits &amp; &lt;friends&gt;" in page and "<friends>" not in page
    assert re.findall(r"https?://|<link|<script|@import|url\(", page) == []
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 3 * 4 + 2  # every image, and the plot in light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in page
    assert "10.40" in page and "make demo" in page


def test_pictures_without_data_are_left_out(report, tmp_path):
    report.write(tmp_path)
    del report.columns["fid"]
    report.images.clear()
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert ".png" not in (tmp_path / "report.md").read_text()

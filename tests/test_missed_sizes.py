"""A size that is missed by more than 0.5 % is warned of, and marked wherever sizes are listed."""

import warnings

import pytest
import torch
from conftest import make_unet
from tiny_transformers import tiny, tiny_inputs

from ofadiff import Supernet, allocate, find_channel_groups
from ofadiff.evaluation.report.report import Report
from ofadiff.evaluation.report.rows import MISSED_NOTE, REACHED, Row
from ofadiff.runs.tables import size_table
from ofadiff.sizes import SizeTable

# Denoisers whose whole heads are coarse, with a budget and a size that they cannot have.
COARSE = [("FluxTransformer2DModel", "macs", 0.98), ("QwenImageTransformer2DModel", "params", 0.6)]


@pytest.mark.parametrize(("name", "budget", "size"), COARSE)
def test_a_missed_size_is_warned_of_and_marked(name, budget, size):
    model = tiny(name)
    groups = find_channel_groups(model)
    scores = {group.name: torch.ones(group.width) for group in groups}
    message = f"sizes are missed by more than 0.5% of the full model's {budget}: {size} has"
    with pytest.warns(UserWarning, match=message):
        table = allocate(model, groups, scores, (size, 1.0), budget, inputs=tiny_inputs(name))
    share = table[0].macs / table.full_macs if budget == "macs" else table[0].params / table.full_params
    assert table.missed == {size: share} and abs(share - size) > 0.005
    assert f"(!) more than 0.5% of the full model's {budget} off: {size} has {share:.1%}" in repr(table)
    lines = size_table(Supernet(model, groups, scores, table).subnets).splitlines()
    assert lines[1].endswith(" (!)") and not lines[2].endswith("(!)") and lines[-1].startswith("(!) more than 0.5%")
    assert SizeTable.from_dict(table.to_dict()).missed == table.missed


def test_sizes_that_are_met_are_not_marked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_unet("plain")
        groups = find_channel_groups(model)
        scores = {group.name: torch.ones(group.width) for group in groups}
        table = allocate(model, groups, scores, (0.6, 1.0))
        paper = allocate(model, groups, scores, (0.6, 1.0), budget="channels")  # no budget, so none is missed
    assert not table.missed and not paper.missed and "(!)" not in repr(table) + repr(paper)


def test_reports_mark_them(tmp_path):
    report = Report("Sizes", {"reached": REACHED}, protocol={"budget": "macs"})
    for size, reached in ((1.0, 1.0), (0.6, 0.55), (0.4, 0.404)):
        report.add_row(Row(str(size), size=size, values={"reached": reached}))
    assert [report.cell(row, "reached") for row in report.rows] == ["100.0 %", "55.0 % (!)", "40.4 %"]
    assert report.table().endswith(MISSED_NOTE)
    report.write(tmp_path)
    assert (
        "55.0 % (!)" in (tmp_path / "report.md").read_text() and "55.0 % (!)" in (tmp_path / "report.html").read_text()
    )
    report.protocol["budget"] = "channels"
    assert "(!)" not in report.table()

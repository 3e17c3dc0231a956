"""What benchmarks/memory.py computes from shapes is what real tensors take; larger sizes take more."""

import memory
import pytest
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.slow

UNET = {
    "sample_size": 8,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def read(cell):
    number, unit = cell.split()
    return float(number) * UNITS[unit]


def test_a_step_takes_what_was_computed():
    with FakeTensorMode():
        model, teacher = memory.make_unet(UNET).train(), memory.make_unet(UNET, memory.DTYPE)
        computed = memory.training_peak(model, teacher)
    model, teacher = memory.make_unet(UNET).train(), memory.make_unet(UNET, memory.DTYPE)
    assert computed > memory.bytes_of(model)  # gradients alone are as large
    assert memory.measured_step(model, teacher) == pytest.approx(computed, rel=memory.KERNELS)


def test_a_size_takes_its_share(monkeypatch):
    monkeypatch.setattr(memory, "SIZES", (0.6, 1.0))
    rows = [row.split(" | ") for row in memory.size_rows(UNET)]
    assert [row[0] for row in rows] == ["| 1", "| 0.6"]
    (full, full_most), (small, small_most) = (map(read, row[3:5]) for row in rows)
    assert small == pytest.approx(0.6 * full, rel=0.05) and small_most <= full_most


def test_a_step_adds_up(monkeypatch):
    monkeypatch.setattr(memory, "SIZES", (1.0,))
    kept, _, _, *steps = memory.step_rows(UNET, (1,))
    weights, average, teacher, *states = map(read, kept.strip("| ").split(" | "))
    assert average == weights and teacher == pytest.approx(weights / 2, rel=0.01)
    assert states[1] == pytest.approx(2 * weights, rel=0.01) and weights < states[0] < states[1]
    assert [row.split(" | ")[:2] for row in steps] == [["| 1", way] for way in ("no", "yes")]
    for row in steps:
        peak, *totals = map(read, row.strip("| ").split(" | ")[2:])
        expected = [2 * weights + teacher + state + max(peak, state) for state in states]
        assert totals == pytest.approx(expected, rel=0.01)

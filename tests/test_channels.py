import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ofadiff.channels import Slice, active_part, read_active_part

GROUPS = Slice("m", "out", units=4, channels=3)
HALVES = Slice("m", "out", units=5, repeats=2)
HEADS = Slice("m", "in", units=4, repeats=3)
QUERIES = Slice("m", "out", units=4, repeats=3, keeps_softmax_scale=True)
TAIL = Slice("m", "in", units=5, start=7)


@pytest.mark.parametrize("part", [GROUPS, HALVES, HEADS, QUERIES, TAIL])
def test_active_part_keeps_the_first_units_of_every_repeat(part):
    # Named entry by entry, independently of how the cut is made.
    kept, dim = 2, 0 if part.axis == "out" else 1
    weight = torch.randn(12, 12) if part is not HALVES else torch.randn(10, 12)
    entries = [
        part.start + (repeat * part.units + unit) * part.channels + channel
        for repeat in range(part.repeats)
        for unit in range(kept)
        for channel in range(part.channels)
    ]
    expected = torch.cat([weight.narrow(dim, 0, part.start), weight.index_select(dim, torch.tensor(entries))], dim)
    if part.keeps_softmax_scale:
        expected = expected * (kept / part.units) ** 0.5
    assert torch.equal(active_part(weight, "weight", ((part, kept),)), expected)


def test_two_groups_share_an_axis():
    first, second = Slice("m", "in", units=3, repeats=2), Slice("m", "in", units=4, start=8)
    weight = torch.arange(13.0).repeat(2, 1)
    cut = active_part(weight, "weight", ((second, 1), (first, 2)))
    assert cut[0].tolist() == [0, 1, 3, 4, 6, 7, 8, 12]


def test_readers_keep_their_bias():
    bias = torch.randn(12)
    assert torch.equal(active_part(bias, "bias", ((HEADS, 1),)), bias)


@pytest.mark.parametrize("part", [GROUPS, HEADS, QUERIES, TAIL])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_reading_a_part_from_a_file_gives_the_same_bits(part, parameter, tmp_path):
    tensor = torch.randn(12, 12, 2) if parameter == "weight" else torch.randn(12)
    save_file({"m": tensor}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as weights:
        read = read_active_part(weights.get_slice("m"), parameter, ((part, 3),), torch.float32)
    assert torch.equal(read, active_part(tensor, parameter, ((part, 3),)))


def test_scores_are_summed_over_the_entries_of_a_unit():
    entries = torch.arange(12.0)
    assert HEADS.per_unit(entries).tolist() == [0 + 4 + 8, 1 + 5 + 9, 2 + 6 + 10, 3 + 7 + 11]
    assert GROUPS.per_unit(entries).tolist() == [3, 12, 21, 30]

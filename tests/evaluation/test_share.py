from types import SimpleNamespace

import pytest
import torch

from ofadiff.evaluation.share import Processes, Share


def processes(count):
    return [Processes(SimpleNamespace(process_index=index, num_processes=count)) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_are_the_same_however_many_processes_there_are(count):
    alone = Share(10, 4, Processes())
    assert alone.batches == [range(0, 4), range(4, 8), range(8, 10)]
    shares = [Share(10, 4, each) for each in processes(count)]
    assert sorted((batch for share in shares for batch in share.batches), key=min) == alone.batches


@pytest.mark.parametrize("count", [2, 5])
def test_gathered_values_are_in_order(count, monkeypatch):
    """Processes without a batch take part, without knowing the shape of a value."""
    shares = [Share(10, 4, each) for each in processes(count)]
    values = torch.randn(10, 3)
    mine = [values[share.indices] if share.indices else torch.empty(0) for share in shares]
    parts = [(share.indices, each) for share, each in zip(shares, mine, strict=True)]
    monkeypatch.setattr("ofadiff.evaluation.share.gather_object", lambda own: parts)
    for share, own in zip(shares, mine, strict=True):
        assert torch.equal(share.gather(own), values)

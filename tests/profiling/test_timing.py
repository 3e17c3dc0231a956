import statistics

import pytest
from conftest import make_unet
from torch import nn

from ofadiff.profiling.timing import REPEATS, WARM_UP, measure_latencies


def test_models_are_timed_in_turns_and_get_their_medians(monkeypatch):
    models = {name: make_unet("plain") for name in ("slow", "fast")}
    calls = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    now = 0

    def clock():  # a forward takes as long as there were forwards before it, and a slow one 100 more
        nonlocal now
        now += len(calls) + 100 * (calls[-1] == "slow")
        return now

    monkeypatch.setattr("ofadiff.profiling.timing.time.perf_counter", clock)
    latencies = measure_latencies(models.items, rounds=2)
    forwards = WARM_UP + REPEATS
    assert calls == 2 * (forwards * ["slow"] + forwards * ["fast"])
    timed = {name: [at for at, call in enumerate(calls, 1) if call == name] for name in models}
    timed = {name: [*places[WARM_UP:forwards], *places[forwards + WARM_UP :]] for name, places in timed.items()}
    assert latencies["slow"] == 100 + statistics.median(timed["slow"])
    assert latencies["fast"] == statistics.median(timed["fast"])


def test_bad_numbers_and_unknown_models_are_errors():
    with pytest.raises(ValueError, match="rounds is 0"):
        measure_latencies(dict, rounds=0)
    with pytest.raises(ValueError, match="no example inputs are known for Linear"):
        measure_latencies({"linear": nn.Linear(1, 1)}.items)

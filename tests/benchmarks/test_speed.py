"""The benchmarks of speed run from end to end and judge what they measure; how fast anything is, no test says."""

import importlib

import importance
import pytest
import side_by_side
import torch
from side_by_side import Comparison, Row, main
from versions import since

pytestmark = pytest.mark.slow

# A part of every row that the benchmark has to have.
ROWS = {
    "composing": (
        "First Block Cache (the last attention ran in",
        "FasterCache",
        "SeaCache",
        "text keys and values",
        "layerwise casting, supernet",
        "int8 weights, extracted",
        "LCM-LoRA, supernet",
    ),
    "guidance_time": ("unconditional half at 0.4", "unconditional half at 0.8"),
    "importance": ("time of 2 samples", "peak memory", "largest relative difference"),
    "elastic_overhead": tuple(
        f"{what} at {size}"
        for size in ("1", "0.7", "0.4")
        for what in ("time: forward and backward", "activations: forward", "largest relative difference")
    ),
    "latency": ("size 0.4", "size 0.6", "size 0.8", "aligned, unaligned"),
    "loading": ("weights that differ", "time: loaded alone", "peak memory: loaded alone"),
    "switch": ("set_size of 20 groups", "first call", "growth over"),
    "benchmarks.training": (
        "time: joint step at 1",
        "memory: joint step at 0.4",
        "block outputs too",
        "joint step at 0.7, at 1",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what composing puts together
@pytest.mark.parametrize("name", ROWS)
def test_benchmark_compares_all_that_it_should_and_finds_equal_results(name, capsys):
    if name == "composing":
        pytest.importorskip("torchao", reason="needs pip install torchao")
        since("diffusers.SeaCacheConfig")
    benchmark = importlib.import_module(name)
    assert main(benchmark.compare, benchmark.__doc__, ["--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "MISSED" not in printed and f"torch {torch.__version__}" in printed
    for row in ROWS[name]:
        assert any(line.startswith("|") and row in line for line in printed.splitlines()), row


def test_unequal_scores_are_a_missed_bound(monkeypatch, capsys):
    exact = importance.score_channels

    def wrong(*args, **kwargs):
        return {name: score * 1.01 for name, score in exact(*args, **kwargs).items()}

    monkeypatch.setattr(importance, "score_channels", wrong)
    assert main(importance.compare, "", ["--device", "cpu", "--quick"]) == 1
    assert "1 bound missed" in capsys.readouterr().out


def test_ratio_is_the_median_over_rounds_and_has_to_keep_its_bound(capsys):
    def compare(comparison):
        comparison.add_times("slow", [1.0, 6.0, 3.0], [1.0, 2.0, 1.0], at_most=2.9)
        comparison.add_times("quick", [1.0, 6.0, 3.0], [1.0, 2.0, 1.0], at_most=3.1)

    assert main(compare, "", ["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| slow | 3e+03 ms | 1e+03 ms | 3.000 | 1.000 – 3.000 | ≤ 2.900 MISSED |" in lines
    assert "| quick | 3e+03 ms | 1e+03 ms | 3.000 | 1.000 – 3.000 | ≤ 3.100 met |" in lines
    assert not Row("", "", "", float("nan"), at_most=1.0).met


def test_sides_take_turns():
    comparison, order = Comparison(torch.device("cpu"), quick=False, rounds=2), []
    times = comparison.time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, calls=2)
    assert [len(values) for values in times.values()] == [2, 2]
    assert "".join(order) == "bbaa" + "aabb" + "bbaa" + "aabb"


def test_bad_input(capsys, monkeypatch):
    monkeypatch.setattr(side_by_side.torch.cuda, "is_available", lambda: False)
    for words, message in (
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--device", "cuda"], "--device is cuda; this machine has cpu"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(lambda comparison: None, "", words)
        assert message in capsys.readouterr().err

"""The largest size that fits a budget of time or memory, measured on this device and remembered."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import make_supernet, make_unet
from diffusers import AutoPipelineForImage2Image, DDPMPipeline, DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from tiny_pipelines import PICTURE, load, make_checkpoint

from ofadiff import OFAPipeline
from ofadiff.pipelines import fitting
from ofadiff.pipelines.fitting import Budget, CallCost, cost_of_call, in_words, largest_that_fits

SMALL, LARGE = 0.6, 1.0
CALL = {"prompt": "a b", "num_inference_steps": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Wide enough that the weights of a size outweigh what varies from call to call.
    return make_checkpoint(tmp_path_factory.mktemp("sd") / "checkpoint")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where measurements are remembered."""
    monkeypatch.setattr(fitting, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ofadiff" / "measured.json"


def memory_at(folder, size):
    pipeline = load(folder, size=size)
    return cost_of_call(pipeline, CALL).memory


def test_the_size_that_is_chosen_by_memory_takes_no_more_of_it(folder):
    small, large = (memory_at(folder, size) for size in (SMALL, LARGE))
    assert small < large
    for memory, expected in ((large, LARGE), (large - 1, SMALL), (small, SMALL)):
        fitted = OFAPipeline.from_pretrained(
            folder, size="fit", max_memory=memory, call=CALL, device="cpu", safety_checker=None
        )
        assert fitted.sizes == (expected,) and fitted.fitted == expected
        assert cost_of_call(fitted, CALL).memory <= memory
        # A pipeline with all sizes says the same.
        assert load(folder).size_for(memory=memory, call=CALL) == expected
    with pytest.raises(ValueError, match=r"no size fits .*KB a call on .*; 0\.6 would with .*B"):
        OFAPipeline.from_pretrained(folder, size="fit", max_memory=small - 1, call=CALL, device="cpu")
    with pytest.raises(ValueError, match=r"no size fits 1KB a call on .*; 0\.6 does not fit into memory"):
        OFAPipeline.from_pretrained(folder, size="fit", max_memory="1KB", call=CALL, device="cpu")


def test_it_says_why_in_one_line(folder):
    size = load(folder).size_for(memory=memory_at(folder, SMALL), call=CALL)
    assert size.reason.count("\n") == 0
    assert size.reason.startswith("size 0.6 takes ") and "; 1 would take " in size.reason
    for copied in (copy.deepcopy(size), pickle.loads(pickle.dumps(size))):
        assert copied == size and copied.reason == size.reason


def test_what_was_measured_is_remembered(folder, home, monkeypatch):
    measured = []

    def cost(pipeline, call):
        measured.append(pipeline.ofa_size)
        return CallCost({SMALL: 100.0, LARGE: 200.0}[pipeline.ofa_size], 10**9)

    monkeypatch.setattr(fitting, "cost_of_call", cost)
    pipeline = load(folder)
    assert pipeline.size_for(latency_ms=150, call=CALL) == SMALL and measured == [LARGE, SMALL]
    assert load(folder).size_for(latency_ms=150, call=CALL) == SMALL and measured == [LARGE, SMALL]
    assert pipeline.size_for(latency_ms=250, call={**CALL, "prompt": "c"}) == LARGE and measured[2:] == [LARGE]
    assert pipeline.size_for(latency_ms=250, call=CALL, measure_again=True) == LARGE and measured[3:] == [LARGE]
    pipeline.to(torch.bfloat16)
    pipeline.size_for(latency_ms=250, call=CALL)
    assert len(measured) == 5
    # What takes another time or memory with the same weights.
    for change in (pipeline.vae.enable_tiling, lambda: pipeline.vae.set_attn_processor(AttnProcessor())):
        change()
        before = len(measured)
        for _ in range(2):
            pipeline.size_for(latency_ms=250, call=CALL)
        assert len(measured) == before + 1
    for broken in (
        "{",
        "[]",
        "[" * 100_000,
        *(
            json.dumps({key: {"latency_ms": milliseconds, "memory": memory} for key in json.loads(home.read_text())})
            for milliseconds, memory in (("x", 1), (float("nan"), 1), (float("inf"), 1), (1.0, -5), (0, 1))
        ),
    ):
        home.write_text(broken)
        before = len(measured)
        assert pipeline.size_for(latency_ms=250, call=CALL) == LARGE and len(measured) == before + 1
    home.unlink()
    home.mkdir()
    assert pipeline.size_for(latency_ms=250, call=CALL) == LARGE
    assert [*home.parent.iterdir()] == [home]  # nothing unfinished stays
    home.rmdir()
    home.parent.rmdir()
    home.parent.write_text("a file in the way")
    assert pipeline.size_for(latency_ms=250, call=CALL) == LARGE


def test_a_long_call_is_timed_by_some_of_its_steps(folder, monkeypatch):
    pipeline = load(folder, size=SMALL)
    made = []
    monkeypatch.setattr(
        fitting, "_milliseconds", lambda call, device: made.append(call.keywords) or 5.0 + 10.0 * steps()
    )
    steps = lambda: made[-1]["num_inference_steps"]  # noqa: E731
    assert cost_of_call(pipeline, {**CALL, "num_inference_steps": 50}).latency_ms == 5.0 + 10.0 * 50
    assert [call["num_inference_steps"] for call in made] == [2, 6]
    made.clear()
    assert cost_of_call(pipeline, {**CALL, "num_inference_steps": 3}).latency_ms == 5.0 + 10.0 * 3
    assert [call["num_inference_steps"] for call in made] == [3]
    # Of image-to-image a share of the steps is left.
    pipeline = OFAPipeline.from_pipe(pipeline, AutoPipelineForImage2Image)
    made.clear()
    steps = lambda: made[-1]["num_inference_steps"] * 0.25  # noqa: E731
    call = {**CALL, "image": PICTURE, "strength": 0.25, "num_inference_steps": 80}
    assert cost_of_call(pipeline, call).latency_ms == pytest.approx(5.0 + 10.0 * 20)
    assert [call["num_inference_steps"] for call in made] == [8, 24]


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ({}, 1),
        ({"strength": None, "denoising_start": None, "denoising_end": 0.75}, 0.75),
        ({"strength": 0.5, "denoising_start": None, "denoising_end": None}, 0.5),
        ({"strength": 0.25, "denoising_start": 0.5, "denoising_end": 1.0}, 0.5),
        ({"strength": 0}, 1),
        ({"strength": "much"}, 1),
    ],
)
def test_how_much_of_the_way_a_call_denoises(arguments, share):
    assert fitting._share_of_the_way(arguments) == share


def test_models_of_pixels_and_classes_need_no_call(tmp_path):
    unet = make_unet("scale_shift")
    make_supernet(unet, sizes=(SMALL, LARGE))
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    pipeline = OFAPipeline.from_pretrained(tmp_path, size="fit", latency_ms=1e9, device="cpu")
    assert pipeline.fitted == LARGE


def test_the_largest_that_fits_both_budgets_is_chosen():
    costs = {0.4: CallCost(100, 10), 0.6: CallCost(150, 20), 0.8: CallCost(200, 30)}
    for latency_ms, memory, expected in (
        (300, 99, 0.8),
        (199, 99, 0.6),
        (300, 20, 0.6),
        (100, 10, 0.4),
        (300, None, 0.8),
    ):
        assert largest_that_fits([*costs], costs.get, Budget(latency_ms, memory), CPU) == expected
    with pytest.raises(
        ValueError, match=r"no size fits 99 ms and 9 bytes a call on .*; 0\.4 would with 100 ms and 10 bytes"
    ):
        largest_that_fits([*costs], costs.get, Budget(99, 9), CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"there is no budget; give latency_ms \(milliseconds\), memory \(such as '6GB'\), or both"),
        ({"latency_ms": 0}, r"latency_ms is 0; it must be a number of milliseconds above 0"),
        ({"latency_ms": float("nan")}, r"latency_ms is nan"),
        ({"latency_ms": "fast"}, r"latency_ms is 'fast'"),
        ({"memory": -1}, r"memory is -1; it must be a number of bytes above 0, or a text such as '6GB' or '6GiB'"),
        ({"memory": "6 parsecs"}, r"memory is '6 parsecs'"),
        ({"memory": "512mb"}, r"memory is '512mb'"),  # bits, to some
        ({"memory": True}, r"memory is True"),
        ({"memory": float("nan")}, r"memory is nan"),
        ({"memory": "0.1.2GB"}, r"memory is '0\.1\.2GB'"),
        ({"memory": "0GB"}, r"memory is '0GB'"),
        ({"memory": "6GB", "call": {"prompts": "a"}}, r"call 1 has the argument 'prompts', which .* does not take"),
    ],
)
def test_a_bad_budget_is_one_sentence(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(folder).size_for(**arguments)


def test_what_belongs_to_fitting_is_refused_without_it_and_a_bad_call_before_loading(folder, monkeypatch):
    for given in ({"latency_ms": 3}, {"max_memory": "6GB"}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is given, but size is 0\\.6; it is for size='fit'"):
            load(folder, size=SMALL, **given)
    monkeypatch.setattr(OFAPipeline, "to", lambda *args: pytest.fail("it was loaded"), raising=False)
    with pytest.raises(ValueError, match=r"call 1 has the argument 'promt'"):
        load(folder, size="fit", max_memory="6GB", call={"promt": "a"}, device="cpu")
    with pytest.raises(ValueError, match=r"max_memory is '6'"):
        load(folder, size="fit", max_memory="6", device="cpu")


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("6GB", 6e9), (" 1.5 GiB", 1.5 * 2**30), ("2TB", 2e12), ("500KB", 5e5), (6e9, 6e9), (np.int64(7), 7)],
)
def test_memory_may_be_said_in_several_ways(memory, expected):
    found = Budget.of(None, memory).memory
    assert found == expected and type(found) is int


def test_memory_in_words_is_rounded_up():
    assert [in_words(size) for size in (999, 1000, 1_234_000, 5_999_999_999)] == ["999 bytes", "1KB", "1.24MB", "6GB"]
    assert all(Budget.of(None, in_words(size)).memory >= size for size in (1001, 1_234_567, 987_654_321_012))

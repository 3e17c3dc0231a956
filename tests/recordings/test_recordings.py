"""What a denoiser was called with comes back as it was, and answers as it did."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as AcceleratorHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks.hooks import HookRegistry, ModelHook
from recordings.tiny_pipelines import CALLS, COMPONENT, PIPELINES
from safetensors.torch import load_file
from versions import skip_if_older

import ofadiff
from ofadiff.commands.app import make_app
from ofadiff.commands.command import call
from ofadiff.pipelines.calls import check_calls, read_calls
from ofadiff.recordings import Recordings, join
from ofadiff.recordings.joining import can_be_joined
from ofadiff.recordings.nested import UnrecordableError, from_spec, to_spec
from ofadiff.recordings.recorded_call import answer_rows

SHORT = {"steps_per_call": 2, "progress": False}


def tensors(answer):
    return [each for entry in answer for each in (entry if isinstance(entry, list) else [entry])]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(tensors(first), tensors(second), strict=True))


@pytest.fixture
def record(saved, load, tmp_path):
    def record(kind, calls=None, folder="recordings", pipeline=None, **options):
        pipeline = load(kind) if pipeline is None else pipeline
        options = {**SHORT, "component": COMPONENT[kind], "image_dir": saved(kind), **options}
        return ofadiff.record(pipeline, CALLS[kind] if calls is None else calls, tmp_path / folder, **options)

    return record


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_recorded_call_gives_the_recorded_answer(kind, record, load):
    recordings = record(kind)
    denoiser = load(kind).components[COMPONENT[kind]]
    assert len(recordings.pipeline_calls) == len(CALLS[kind]) and recordings.missing == 0
    for recorded in recordings:
        assert same(recorded.replay(denoiser), recorded.answer)
        assert recorded.args or recorded.kwargs
    calls = list(recordings)
    if can_be_joined(denoiser, calls):
        parts = join(calls)
        assert len(parts) < len(calls) and sum(part.rows for part in parts) == sum(call.rows for call in calls)
        for part in parts:
            torch.testing.assert_close(
                answer_rows(part.replay(denoiser)), answer_rows(part.answer), rtol=1e-3, atol=1e-4
            )


def test_both_halves_of_guidance_are_kept(record):
    separate = record("wan", steps_per_call=1)  # two calls a step
    assert len(separate) == 2 * len(CALLS["wan"]) and {call.rows for call in separate} == {1}
    first, second = separate[:2]
    assert torch.equal(first.kwargs["timestep"], second.kwargs["timestep"])
    assert not torch.equal(first.kwargs["encoder_hidden_states"], second.kwargs["encoder_hidden_states"])
    together = record("latte", folder="together", steps_per_call=1)  # one call with both
    assert {call.rows for call in together} == {2}


def with_hook(denoiser):
    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(ModelHook(), "nothing")
    return denoiser


def with_forward_of_accelerate(denoiser):
    add_hook_to_module(denoiser, AcceleratorHook())
    return denoiser


def compiled(denoiser):
    return torch.compile(denoiser, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, with_hook, with_forward_of_accelerate])
def test_a_wrapped_denoiser_is_recorded_as_what_it_is(wrap, record, load):
    if wrap is compiled:
        skip_if_older("diffusers", "Wan that torch.compile of torch 2.8 takes")
    bare = record("wan", steps_per_call=1)
    pipeline = load("wan")
    pipeline.transformer = wrap(pipeline.transformer)
    wrapped = record("wan", pipeline=pipeline, folder="wrapped", steps_per_call=1)
    assert wrapped.description == bare.description and len(wrapped) == len(bare) == 2 * len(CALLS["wan"])
    for one, other in zip(wrapped, bare, strict=True):
        torch.testing.assert_close(one.answer, other.answer)


def test_weights_that_are_elsewhere_are_named(record, load):
    offloaded, empty = load("latte"), load("latte")
    cpu_offload(offloaded.transformer, execution_device=torch.device("cpu"))
    empty.transformer.to("meta")
    for pipeline in (offloaded, empty):
        with pytest.raises(ValueError, match="of this LatteTransformer3DModel is on the meta device, as sequential"):
            record("latte", pipeline=pipeline)


def test_what_stays_within_a_call_is_kept_once(record):
    recordings = record("cogvideox", steps_per_call=2)
    call = recordings[0]
    rotary = call.kwargs["image_rotary_emb"]
    assert type(rotary) is tuple and len(rotary) == 2
    kept = load_file(next((recordings.folder / "calls").glob("*.safetensors")))
    shapes = [tuple(tensor.shape) for tensor in kept.values()]
    assert shapes.count(tuple(rotary[0].shape)) == 2  # cosines and sines of two steps
    assert shapes.count(tuple(call.kwargs["encoder_hidden_states"].shape)) == 1


def test_all_steps_are_drawn_alike(record):
    steps = []
    for seed in range(30):
        recordings = record("latte", [CALLS["latte"][0] | {"num_inference_steps": 4}], f"r{seed}", seed=seed)
        steps += [call.arguments["timestep"].max().item() for call in recordings]
    moments, counts = np.unique(steps, return_counts=True)
    assert len(moments) == 4 and counts.min() >= 6 and counts.sum() == 60


def test_nested_values_come_back():
    wide = torch.arange(6.0).view(1, 3, 2).expand(4, 3, 2)
    value = {
        "a": [torch.ones(2, dtype=torch.bfloat16), None, True, 3, 2.5, float("inf"), "x"],
        "b": (wide, torch.randn(1, 2, 4, 4).to(memory_format=torch.channels_last)),
        "c": {"shape": torch.Size([1, 2]), "dtype": torch.float16, 7: np.arange(3)},
        "d": [(torch.tensor(True), torch.tensor(5), torch.randn(2, dtype=torch.complex64))],
        "e": torch.zeros(0, 3),
        "f": torch.ones(1).expand(1),
    }
    kept = {}
    spec = json.loads(json.dumps(to_spec(value, kept, "value")))
    assert all(tensor.is_contiguous() for tensor in kept.values())
    back = from_spec(spec, kept)
    assert back.keys() == value.keys() and back["a"][0].dtype == torch.bfloat16 and back["a"][1:] == value["a"][1:]
    assert torch.equal(back["b"][0], wide) and back["b"][0].stride() == wide.stride()
    assert torch.equal(back["b"][1], value["b"][1]) and back["b"][1].stride() == value["b"][1].stride()
    assert type(back["c"]["shape"]) is torch.Size and back["c"]["dtype"] is torch.float16
    assert isinstance(back["c"][7], np.ndarray) and back["c"][7].tolist() == [0, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(back["d"][0], value["d"][0], strict=True))
    assert back["e"].shape == (0, 3)
    with pytest.raises(UnrecordableError, match=r"value\['k'\]\[0\] is a object, which cannot be recorded"):
        to_spec({"k": [object()]}, {}, "value")


@pytest.mark.slow
def test_a_killed_recording_goes_on(saved, record, tmp_path):
    calls = CALLS["latte"] * 10
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, calls)))
    words = ["record", "--pretrained_model_name_or_path", str(saved("latte") / "pipeline")]
    words += ["--calls_file", str(tmp_path / "calls.jsonl"), "--steps_per_call", "2"]
    words += ["--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-m", "ofadiff", *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("calls/00000[1-9].safetensors")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(Recordings(tmp_path / "killed").pipeline_calls) < len(calls)
    resumed = call(make_app(), words)
    whole = record("latte", calls, "whole")
    assert resumed.missing == 0 and len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert same(one.answer, other.answer) and one.kwargs.keys() == other.kwargs.keys()


def test_a_recording_of_something_else_is_refused(record, load, tmp_path):
    record("latte")
    with pytest.raises(ValueError, match="holds recordings of other calls"):
        record("latte", CALLS["latte"][:1])
    with pytest.raises(ValueError, match="whose seed is 0, not 1"):
        record("latte", seed=1)
    changed = load("latte")
    with torch.no_grad():
        changed.transformer.proj_out.bias += 1
    with pytest.raises(ValueError, match="whose weights is SHA-256"):
        record("latte", pipeline=changed)
    with pytest.raises(ValueError, match="whose pipeline is LattePipeline, not WanPipeline"):
        record("wan")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is no folder of recordings, and not empty"):
        record("latte", folder="other")
    assert record("latte").missing == 0  # it is still there


def test_it_stops_at_the_limit(record):
    whole = record("latte", folder="whole")
    limit = whole.bytes * 2 // 3 + 1
    with pytest.warns(UserWarning, match="2 of 3 calls are recorded: more would take over"):
        some = record("latte", max_bytes=limit)
    assert some.bytes <= limit and some.missing == 1
    with pytest.raises(ValueError, match=r"one call takes \d+ bytes of recordings, more than the 100 allowed"):
        record("latte", folder="none", max_bytes=100)


def test_bad_calls_are_named_before_the_first_sample(load, saved, tmp_path):
    img2img, video = type(load("sd_img2img")), type(load("wan"))
    folder = saved("sd_img2img")
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = {"prompt": "a", "image": "image.png"}
    for calls, message in [
        ([good, {"prompt": "a", "image": "absent.png"}], r"call 2: image .*absent\.png is no file"),
        (
            [good, {**good, "imge": 1}],
            "call 2 has the argument 'imge', which StableDiffusionImg2Img.* does not",
        ),
        ([{"prompt": "a", "image": tmp_path / "broken.png"}], r"call 1: image .*broken\.png is no image"),
        ([3], "call 1 is a int; it must be a prompt, or a dict of arguments"),
        ("a prompt", "calls is one str; give a list"),
        ([], "there is no call"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_calls(img2img, calls, folder=folder)
    with pytest.raises(ValueError, match="call 1 has the argument 'image'"):
        check_calls(video, [good], folder=folder)
    with pytest.raises(ValueError, match=r"call 1 of StableVideoDiffusionPipeline: missing a required .*'image'"):
        check_calls(type(load("svd")), [{"num_frames": 2}])
    assert check_calls(video, ["a"], {"num_frames": 5}) == [{"num_frames": 5, "prompt": "a"}]


def test_files_of_calls(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    assert read_calls(tmp_path / "a.txt") == ["a cat", "a dog"]
    (tmp_path / "a.csv").write_text('prompt,height,image,timesteps\n"12, a cat",64,b.png,"[3, 1]"\n7,,,\n')
    assert read_calls(tmp_path / "a.csv") == [
        {"prompt": "12, a cat", "height": 64, "image": "b.png", "timesteps": [3, 1]},
        {"prompt": "7"},
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "num_frames": 17}\n"b"\n')
    assert read_calls(tmp_path / "a.jsonl") == [{"prompt": "a", "num_frames": 17}, "b"]
    for name, text, message in [
        ("b.jsonl", '{"prompt": "a"}\n[1]', "line 2 is a list; it must be a prompt, or an object"),
        ("b.json", "{}", "it must be a list of calls"),
        ("b.txt", "\n", "there are no calls in"),
        ("c.jsonl", "{", "line 1 is not JSON"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_calls(tmp_path / name)
    with pytest.raises(ValueError, match="is not a file of calls"):
        read_calls(tmp_path / "absent.txt")


def test_which_denoiser_is_meant(load, record, saved):
    pipeline = load("wan_2_2")
    with pytest.raises(ValueError, match="has several denoisers, transformer and transformer_2; say which one"):
        record("wan_2_2", pipeline=pipeline, component=None)
    with pytest.raises(ValueError, match="component is 'vae', which is no denoiser of this WanPipeline"):
        record("wan_2_2", pipeline=pipeline, component="vae")
    second = record("wan_2_2", pipeline=pipeline, component="transformer_2", folder="second")
    assert same(second[0].replay(pipeline.transformer_2), second[0].answer)
    assert not same(second[0].replay(pipeline.transformer), second[0].answer)


def test_a_damaged_or_absent_recording_is_named(record, tmp_path):
    recordings = record("latte")
    with pytest.raises(ValueError, match=r"holds no recordings\.json"):
        Recordings(tmp_path)
    file = next((recordings.folder / "calls").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged; remove it, and record its call again"):
        Recordings(recordings.folder)
    file.unlink()
    assert record("latte").missing == 0
    shutil.rmtree(recordings.folder / "calls")
    with pytest.raises(ValueError, match="holds no recorded call yet"):
        Recordings(recordings.folder)

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from ofadiff import Supernet
from ofadiff.denoisers.dit import DIT
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.runs import Calls, Compression, Data, Model, Output, RunSettings
from ofadiff.runs.run import check_run
from ofadiff.training.sharding import check_sharding, split_alone
from training.fsdp_on_cpu import make_sharded_accelerator
from training.larger_than_a_card import MODELS, STEPS, go_through, make
from training.sharded_run import run

pytestmark = pytest.mark.slow

# Whose memory is looked at; the others are too small for it.
MEASURED = ("FluxTransformer2DModel", "UNet2DConditionModel")
# Blocks that FSDP has whole at once, and what a forward and backward of two samples keep.
BLOCKS, ACTIVATIONS = 3, 2**20
# Of tensors that are too small to be counted one by one.
SMALL = 2**16


@pytest.fixture(scope="module")
def sharded(nursery, tmp_path_factory):
    """What two processes under FSDP have written."""
    folder = tmp_path_factory.mktemp("sharded")
    run = str(Path(__file__).with_name("sharded_run.py"))
    ended, log = nursery.start({"recipe": run, "words": [str(folder)], "processes": 2, "sharded": False})
    assert ended == [0, 0], log
    return folder


def weights(folder):
    return Supernet.from_pretrained(folder).model.state_dict()


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_split_weights_train_as_whole_ones_do(sharded, make_accelerator, tmp_path):
    supernet, result = run(make_accelerator(gradient_accumulation_steps=2), tmp_path, train_batch_size=4)
    close(weights(sharded / "whole" / "unet"), supernet.model.state_dict())
    history = json.loads((sharded / "whole" / "history.json").read_text())
    for step, losses in result.history.items():
        assert history[str(step)] == pytest.approx({str(size): loss for size, loss in losses.items()}, rel=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(sharded, make_accelerator, tmp_path):
    whole, resumed = weights(sharded / "whole" / "unet"), weights(sharded / "resumed" / "unet")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    # On one process, too: a checkpoint is the same whoever wrote it.
    checkpoint = sharded / "whole" / "checkpoint-2"
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    supernet, _ = run(accelerator, tmp_path, train_batch_size=4, resume_from=checkpoint)
    close(supernet.model.state_dict(), whole)


@pytest.mark.parametrize("name", MODELS)
def test_other_denoisers_train_as_whole_ones_do(name, sharded, make_accelerator, tmp_path):
    go_through(make_accelerator(), name, tmp_path, batch_size=2)
    for folder in (f"checkpoint-{STEPS}/denoiser", "final"):
        split, alone = sharded / name / folder, tmp_path / folder
        close(weights(split), weights(alone))
        assert {path.name for path in split.iterdir()} == {path.name for path in alone.iterdir()}
        assert (split / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    for file in ("ema.safetensors", "optimizer.safetensors"):
        split, alone = (load_file(folder / f"checkpoint-{STEPS}" / file) for folder in (sharded / name, tmp_path))
        close(split, alone)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("name", MEASURED)
def test_a_process_holds_its_share_and_some_blocks(name, rank, sharded):
    """Two processes; beside its share a process holds, at most, what each phase takes for itself."""
    found = json.loads((sharded / f"{name}-{rank}.json").read_text())
    share, whole, block = found["share"], found["whole"], found["block"]
    # Where the first dimension of a tensor is odd the parts are not equal.
    assert share["weights"] <= 0.52 * whole and share["EMA"] <= 0.52 * whole and share["moments"] <= 1.05 * whole
    assert share["teacher"] <= 0.52 * found["whole teacher"]
    beside = {phase: found[phase] - share["all"] for phase in ("train", "validate", "checkpoint", "save")}
    assert found["score"] <= 0.4 * whole  # activations, nearly all of it
    # Gradients, of which AdamW or the average makes a copy while it steps.
    assert beside["train"] <= 2 * share["weights"] + BLOCKS * block + ACTIVATIONS
    # What the weights were while their average is in their place, in main memory.
    assert beside["validate"] <= share["weights"] + BLOCKS * block + ACTIVATIONS
    # Weights, their average and both moments are gathered one tensor at a time, and at least one is.
    for phase in ("checkpoint", "save"):
        assert 0.9 * found["largest tensor"] <= beside[phase] <= found["largest tensor"] + SMALL


def test_what_is_written_is_a_plain_model(sharded):
    for folder in (sharded / "whole" / "checkpoint-2" / "denoiser", sharded / "whole" / "unet"):
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DModel"
        assert type(UNet2DModel.from_pretrained(folder)) is UNet2DModel


@pytest.mark.parametrize(
    ("changes", "samples", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, 8, "configured for DEEPSPEED, .* choose multi-GPU or FSDP"),
        ({"fsdp_version": 1}, 8, "choose fsdp_version 2"),
        ({"mixed_precision": "fp16"}, 8, "fp16 does not work with FSDP: choose bf16"),
        ({"cpu_offload": True}, 8, "fsdp_offload_params is not supported"),
        ({}, 7, "7 validation samples cannot be shared out evenly, .* multiple of the 2 processes"),
    ],
)
def test_what_does_not_work_is_said(monkeypatch, changes, samples, message):
    accelerator = make_sharded_accelerator(cpu=True)
    state, plugin = accelerator.state, accelerator.state.fsdp_plugin
    monkeypatch.setitem(state._shared_state, "num_processes", 2)
    for name, value in changes.items():
        if name == "distributed_type":
            state.distributed_type = value
        elif name == "mixed_precision":
            state._shared_state["_mixed_precision"] = value
        else:
            setattr(plugin, name, CPUOffloadPolicy() if name == "cpu_offload" else value)
    with pytest.raises(ValueError, match=message):
        check_sharding(accelerator, samples)


@pytest.mark.parametrize(
    ("compression", "data", "message"),
    [
        ({"budget": "latency"}, {}, "--budget latency does not work with FSDP, .* choose --budget params or macs"),
        ({}, {"train_data_dir": "images"}, "images among recordings do not work with FSDP, .* leave out"),
    ],
)
def test_what_needs_a_whole_model_or_other_calls_is_refused_first(compression, data, message):
    settings = RunSettings(
        Model(pretrained_model_name_or_path="x"),
        Data(**data),
        Output(output_dir="y"),
        calls=Calls(calls_file="z"),
        compression=Compression(**compression),
    )
    original = SimpleNamespace(kind=UNET_2D, denoiser=None)
    with pytest.raises(ValueError, match=message):
        check_run(settings, make_sharded_accelerator(cpu=True), original, None)


def test_what_is_used_outside_its_block_is_split_alone():
    accelerator, model = make_sharded_accelerator(cpu=True), make("DiTTransformer2DModel")
    plugin = accelerator.state.fsdp_plugin
    for _ in range(2):
        split_alone(accelerator, model, DIT.split_alone)
        assert plugin.transformer_cls_names_to_wrap == ["ResnetBlock2D", "Attention", *DIT.split_alone]
    plugin.auto_wrap_policy = size_based_auto_wrap_policy
    with pytest.raises(ValueError, match=r"splits modules by their sizes, .* choose TRANSFORMER_BASED_WRAP"):
        split_alone(accelerator, model, DIT.split_alone)
    split_alone(accelerator, model, UNET_2D.split_alone)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from diffusers import UNet2DModel
from torch.distributed.fsdp import CPUOffloadPolicy

from ofadiff import Supernet
from ofadiff.training.sharding import check_sharding
from training.fsdp_on_cpu import make_sharded_accelerator
from training.sharded_run import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes under FSDP have written."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "training" / "sharded_run.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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

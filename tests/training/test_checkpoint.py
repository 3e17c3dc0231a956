import dataclasses
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from test_written_before import WRITTEN

from ofadiff import Supernet
from ofadiff.training.checkpoint import (
    DENOISER,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from training.tiny_run import make_supernet


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_state(supernet, steps=0, optimizer_class=adamw, **run):
    """A state after some steps on noise for gradients."""
    optimizer = optimizer_class(supernet.model.parameters())
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    ema = EMAModel(supernet.model.parameters(), decay=0.9)
    state = TrainingState(supernet, ema, optimizer, scheduler, run=run)
    advance(state, steps)
    return state


def advance(state, steps):
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.supernet.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.lr_scheduler.step()
        state.ema.step(state.supernet.model.parameters())
        state.step += 1


def weights(state):
    return [*state.supernet.model.state_dict().values(), *state.ema.shadow_params]


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    state = make_state(make_supernet(), steps=3, seed=1)
    state.history = {0: {0.5: 0.25, 1.0: 0.125}}
    state.seconds = 1.5
    checkpoint = save_checkpoint(state, tmp_path)
    advance(state, 3)

    loaded = make_state(make_supernet(), seed=1)
    load_checkpoint(loaded, checkpoint)
    assert (loaded.step, loaded.seconds, loaded.history) == (3, 1.5, {0: {0.5: 0.25, 1.0: 0.125}})
    advance(loaded, 3)
    assert all(torch.equal(*pair) for pair in zip(weights(state), weights(loaded), strict=True))
    assert loaded.lr_scheduler.get_last_lr() == state.lr_scheduler.get_last_lr()


def test_a_checkpoint_is_safetensors_and_json_and_holds_a_supernet(tmp_path):
    checkpoint = save_checkpoint(make_state(make_supernet(), steps=1), tmp_path)
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert Supernet.from_pretrained(checkpoint / DENOISER).sizes == (0.5, 0.75, 1.0)


def test_a_killed_save_leaves_no_checkpoint_and_does_not_stop_the_next_one(tmp_path, monkeypatch):
    state = make_state(make_supernet(), steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", kill)  # the last thing to be written
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(state, tmp_path)
    assert list_checkpoints(tmp_path) == [] and find_checkpoint(tmp_path, "latest") is None
    advance(state, 1)
    assert save_checkpoint(state, tmp_path) == find_checkpoint(tmp_path, "latest")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def kill(*args, **kwargs):
    raise KeyboardInterrupt


def test_the_oldest_checkpoints_beyond_the_limit_go(tmp_path):
    state = make_state(make_supernet(), steps=8)
    for _ in range(4):
        save_checkpoint(state, tmp_path, total_limit=2)
        advance(state, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-11"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10")).name == "checkpoint-10"


class TabledSGD(torch.optim.Optimizer):
    """Momentum, with what 8-bit optimizers keep beside it: a number of steps, and, deeper, a table that all share."""

    table = torch.linspace(-1, 1, 5)

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, momentum=torch.zeros_like(parameter), quantization={"table": self.table})
            state["step"] += 1
            state["momentum"].mul_(0.9).add_(parameter.grad / state["step"])
            parameter.data.sub_(state["momentum"], alpha=0.1)


def test_optimizers_may_keep_numbers_and_share_tensors(tmp_path):
    state = make_state(make_supernet(), optimizer_class=TabledSGD, steps=2)
    checkpoint = save_checkpoint(state, tmp_path)
    advance(state, 2)
    loaded = make_state(make_supernet(), optimizer_class=TabledSGD)
    load_checkpoint(loaded, checkpoint)
    advance(loaded, 2)
    assert all(torch.equal(*pair) for pair in zip(weights(state), weights(loaded), strict=True))
    for values in loaded.optimizer.state.values():
        assert values["step"] == 4 and torch.equal(values["quantization"]["table"], TabledSGD.table)


def test_another_run_cannot_be_resumed(tmp_path):
    checkpoint = save_checkpoint(make_state(make_supernet(), steps=1, seed=1), tmp_path)
    with pytest.raises(ValueError, match="its seed is 1, this run's is 2"):
        load_checkpoint(make_state(make_supernet(), seed=2), checkpoint)
    with pytest.raises(ValueError, match=r"its sizes is \(0.5, 0.75, 1.0\), this run's is \(0.5, 1.0\)"):
        load_checkpoint(make_state(make_supernet(sizes=(0.5, 1.0)), seed=1), checkpoint)
    other = make_supernet()
    name = next(iter(other.basis))
    other.basis[name] = other.basis[name].flip(0)
    with pytest.raises(ValueError, match="another order or basis"):
        load_checkpoint(make_state(other, seed=1), checkpoint)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint to resume from; expected a checkpoint-N folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"))
    with pytest.raises(ValueError, match=r"has no state\.json"):
        load_checkpoint(make_state(make_supernet()), tmp_path)
    assert find_checkpoint(tmp_path, None) is None


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of a run, and its state at step 2."""
    folder = tmp_path_factory.mktemp("run")
    state = make_state(make_supernet(), steps=1)
    save_checkpoint(state, folder)
    advance(state, 1)
    save_checkpoint(state, folder)
    return folder, state


@pytest.fixture
def run_folder(two_checkpoints, tmp_path):
    """A copy of it that may be harmed."""
    return shutil.copytree(two_checkpoints[0], tmp_path / "run")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forget(path):
    path.unlink()


def scribble(path):
    path.write_text("{")


def nest(path):
    path.write_text("[" * 200_000)


TEARS = [
    (flip_a_bit, "optimizer.safetensors", "optimizer.safetensors is not what was written"),
    (flip_a_bit, "denoiser/diffusion_pytorch_model.safetensors", "model.safetensors is not what was written"),
    (cut_short, "ema.safetensors", r"ema.safetensors has \d+ bytes, \d+ were written"),
    (forget, "denoiser/config.json", "denoiser/config.json is missing"),
    (forget, "state.json", "state.json is missing"),
    (forget, "digests.json", "digests.json is missing"),
    (scribble, "state.json", "state.json is no JSON"),
    (scribble, "digests.json", "digests.json is not what was written"),
    (nest, "state.json", "state.json is no JSON"),
    (nest, "digests.json", "digests.json is not what was written"),
]


@pytest.mark.parametrize(("tear", "file", "said"), TEARS)
def test_a_torn_checkpoint_is_named_and_the_newest_whole_one_is_used(run_folder, caplog, tear, file, said):
    assert find_checkpoint(run_folder, "latest").name == "checkpoint-2" and not caplog.text
    tear(run_folder / "checkpoint-2" / file)
    assert find_checkpoint(run_folder, "latest").name == "checkpoint-1"
    (warning,) = caplog.messages
    assert re.search(f"checkpoint-2 is torn and passed over: .*{said}", warning)
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-2, which is torn: .*{said}"):
        find_checkpoint(run_folder, "checkpoint-2")
    tear(run_folder / "checkpoint-1" / file)
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is whole: checkpoint-2 \(.*{said}.*checkpoint-1 \("):
        find_checkpoint(run_folder, "latest")


def say(**values):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rename(name, other):
    def change(path):
        tensors = load_file(path)
        save_file({other if each == name else each: tensor for each, tensor in tensors.items()}, path)

    return change


STRANGE = [
    (scribble, "state.json", r"state\.json is not JSON"),
    (say(step="two"), "state.json", r"state\.json has the step 'two'; it must be a whole number"),
    (say(place=3), "state.json", r"state\.json has the place 3; it must be a list"),
    (say(param_groups=[3]), "state.json", r"a group of weights in .*state\.json is 3; it must be an object"),
    (say(param_groups=[]), "state.json", "its number of the optimizer's groups of weights is 0, this run's is 1"),
    (say(history={"1": {"1.0": "low"}}), "state.json", r"the history .* has at step '1' \{'1.0': 'low'\}; it must be"),
    (say(optimizer={"999.step": 1}), "state.json", "its optimizer holds '999.step'; names begin with the number of a"),
    (cut_short, "optimizer.safetensors", r"optimizer\.safetensors cannot be read: it is damaged, cut short"),
    (rename("0.exp_avg", "first"), "optimizer.safetensors", "its optimizer holds 'first'; names begin with"),
    (rename("conv_in.bias", "b"), "ema.safetensors", r"ema\.safetensors cannot be read: .* tensor conv_in\.bias"),
    (forget, "ema.safetensors", r"ema\.safetensors"),
]


@pytest.mark.parametrize(("change", "file", "said"), STRANGE)
def test_a_file_that_is_not_what_a_checkpoint_has_is_named(two_checkpoints, run_folder, change, file, said):
    checkpoint = run_folder / "checkpoint-2"
    change(checkpoint / file)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_checkpoint(two_checkpoints[1], checkpoint)


def test_checkpoints_without_digests_are_whole_unless_a_file_is_cut_short(tmp_path):
    """They were written before there were any."""
    shutil.copytree(WRITTEN / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    cut_short(tmp_path / "checkpoint-2" / "denoiser" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-2 \(denoiser/diffusion_pytorch_model.safetensors is not"):
        find_checkpoint(tmp_path, "latest")


def test_torn_checkpoints_do_not_push_out_whole_ones(two_checkpoints, run_folder):
    os.replace(run_folder / "checkpoint-1", run_folder / "checkpoint-9")
    cut_short(run_folder / "checkpoint-9" / "ema.safetensors")
    state = two_checkpoints[1]
    for step in (3, 4):
        save_checkpoint(dataclasses.replace(state, step=step), run_folder, total_limit=1)
        assert [path.name for path in list_checkpoints(run_folder)] == [f"checkpoint-{step}", "checkpoint-9"]
        assert find_checkpoint(run_folder, "latest").name == f"checkpoint-{step}"


def test_a_checkpoint_that_was_being_replaced_is_found_and_gets_its_name_back(two_checkpoints, run_folder):
    """A kill between two renames leaves it under a hidden name, and the new one, whole, under another."""
    state, orphan = two_checkpoints[1], run_folder / ".checkpoint-2-replaced"
    shutil.copytree(run_folder / "checkpoint-1", run_folder / ".checkpoint-1-replaced")  # the new one has its name
    os.replace(run_folder / "checkpoint-2", orphan)
    shutil.copytree(orphan, run_folder / ".checkpoint-2")
    assert [path.name for path in list_checkpoints(run_folder)] == ["checkpoint-1", orphan.name]
    assert find_checkpoint(run_folder, "latest") == orphan
    load_checkpoint(state, orphan)
    save_checkpoint(dataclasses.replace(state, step=3), run_folder)
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def read(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_is_said(two_checkpoints, small_disk):
    state = two_checkpoints[1]
    checkpoint = save_checkpoint(state, small_disk)
    before = read(checkpoint)
    # Room for the weights, not for the optimizer's.
    size = sum(map(len, before.values()))
    (small_disk / "fill").write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 2))
    following = dataclasses.replace(state, step=3)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-3: .*No space left.*; checkpoint-2 is whole: mend"):
        save_checkpoint(following, small_disk, total_limit=1)
    assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoint-2", "fill"]
    assert read(checkpoint) == before
    (small_disk / "fill").unlink()
    assert save_checkpoint(following, small_disk, total_limit=1) == find_checkpoint(small_disk, "latest")


def test_a_disk_that_fails_in_the_first_checkpoint_leaves_nothing(two_checkpoints, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ofadiff.training.checkpoint.write_whole", full)
    with pytest.raises(OSError, match=r"checkpoint-2: .*No space left on device; there is no earlier checkpoint"):
        save_checkpoint(two_checkpoints[1], tmp_path)
    assert not list(tmp_path.iterdir())

import json

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

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

"""What is not finite: a validation stops the run, a step is skipped, so many steps in a row stop the run."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import training.test_train
from ofadiff.data.order import step_batches
from ofadiff.storage.finite import NotFiniteError
from ofadiff.training.checkpoint import list_checkpoints
from training.test_train import run, same  # noqa: F401
from training.tiny_run import make_supernet, make_teacher


def spoil(model, rows=slice(-1, None)):
    with torch.no_grad():
        model.down_blocks[0].resnets[0].conv1.weight[rows] = float("nan")
    return model


def test_a_validation_loss_that_is_no_number_stops_and_names_the_size(run, tmp_path):  # noqa: F811
    supernet = make_supernet()
    spoil(supernet.model)  # what the smaller sizes do not use
    with pytest.raises(NotFiniteError, match="the validation loss of size 1 at step 0 is nan"):
        run(supernet)
    with pytest.raises(NotFiniteError, match="the teacher's validation loss is nan"):
        run(teacher=spoil(make_teacher()))


@pytest.fixture
def spoil_steps(monkeypatch):
    """Puts a value into what some steps learn, which are known by the seeds of their samples."""
    prepare_pixels = training.test_train.prepare_pixels

    def spoil_steps(values):
        batches = enumerate(step_batches(14, range(10), 1, 4, seed=5))
        bad = {keys[-1][1]: values[step] for step, keys in batches if step in values}

        def prepare(batch, **options):
            inputs = prepare_pixels(batch, **options)
            target = inputs.target.clone()
            for number, seed in enumerate(batch["seeds"].tolist()):
                if seed in bad:
                    target[number] = bad[seed]
            return dataclasses.replace(inputs, target=target)

        monkeypatch.setattr(training.test_train, "prepare_pixels", prepare)

    return spoil_steps


def tensors(folder):
    files = folder.rglob("*.safetensors")
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(run, tmp_path, spoil_steps, caplog):  # noqa: F811
    options = {"checkpointing_steps": 2, "validation_steps": 10, "teacher": None}
    expected, _ = run(max_train_steps=2, output_dir=tmp_path / "two", **options)
    spoil_steps({2: float("nan"), 3: 1e19, 4: float("inf")})  # of the second the square is not finite
    supernet, result = run(max_train_steps=5, **{**options, "checkpointing_steps": 5})
    assert same(supernet, expected) and result.steps == 5
    ours, theirs = tensors(tmp_path / "checkpoint-5"), tensors(tmp_path / "two" / "checkpoint-2")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = json.loads((tmp_path / "checkpoint-5" / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_row"], state["ema_steps"]) == (3, 3, 2)
    assert sum("the step is skipped" in message for message in caplog.messages) == 3
    assert "3 of 5 steps were skipped" in caplog.text


def test_steps_in_a_row_that_are_not_finite_stop_the_run_with_advice_wherever_it_was_resumed(
    run,  # noqa: F811
    tmp_path,
    spoil_steps,
):
    spoil_steps(dict.fromkeys((1, 3, 4, 5, 6), float("nan")))
    options = {"max_train_steps": 9, "checkpointing_steps": 2, "validation_steps": 10, "max_skipped_steps": 3}
    options["teacher"] = None
    advice = r"the loss is nan .* at step 5, size .*, the last of 3 such steps in a row .*lower --learning_rate"
    with pytest.raises(NotFiniteError, match=f"{advice}.*; the last checkpoint is checkpoint-4"):
        run(**options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(NotFiniteError, match=advice):
        run(**options, resume_from=tmp_path / "checkpoint-4")

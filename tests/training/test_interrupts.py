"""A signal ends a run after the step that is being made, with a checkpoint; a second one ends it at once."""

import json
import signal
import threading

import pytest
import torch

import training.test_train
from ofadiff.training import interrupts
from ofadiff.training.checkpoint import find_checkpoint, list_checkpoints
from ofadiff.training.interrupts import InterruptedRun, Interrupts, finished_first
from training.test_train import run, same  # noqa: F401

ALL = [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]


@pytest.fixture(autouse=True)
def as_a_shell_starts_it():
    """Whoever started the tests may have told them to ignore Ctrl-C, as a shell does in the background."""
    defaults = signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL
    before = [signal.signal(number, handler) for number, handler in zip(ALL, defaults, strict=True)]
    yield
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in ALL]


@pytest.fixture
def in_step(monkeypatch):
    """Calls something in the n-th forward of training, validations aside."""

    def in_step(count, action):
        predict, calls = training.test_train.prepare_pixels, []

        def prepare(batch, **options):
            if torch.is_grad_enabled():
                calls.append(batch)
                if len(calls) == count:
                    action()
            return predict(batch, **options)

        monkeypatch.setattr(training.test_train, "prepare_pixels", prepare)

    return in_step


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_noted_once_and_a_second_one_acts_at_once(number, monkeypatch):
    monkeypatch.setattr(interrupts, "SAME_SECONDS", 0.0)
    heard = []
    before = signal.signal(number, lambda *arguments: heard.append(number))
    try:
        with Interrupts() as noted:
            assert noted.received is None
            signal.raise_signal(number)
            assert noted.received == number and not heard
            signal.raise_signal(number)
            assert heard == [number]
        with pytest.raises(InterruptedRun, match="but all is written"), finished_first("all is written"):
            signal.raise_signal(number)
        assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number, number]
    finally:
        signal.signal(number, before)


def test_what_a_launcher_passes_on_of_the_same_ctrl_c_is_no_second_one():
    with Interrupts() as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert noted.received == signal.SIGINT


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as noted:
            signal.raise_signal(signal.SIGINT)
        assert noted.received is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(run, tmp_path, in_step):  # noqa: F811
    """Also with the validation that was due when the signal came, which waits until the run goes on."""
    before = handlers()
    options = {"max_train_steps": 4, "validation_steps": 2, "output_dir": tmp_path / "run"}
    whole, expected = run(**{**options, "output_dir": tmp_path / "whole"})
    in_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(InterruptedRun, match=r"stopped by SIGTERM after step 2, with a checkpoint.* latest$") as stop:
        run(**options)
    assert stop.value.number == signal.SIGTERM and isinstance(stop.value, KeyboardInterrupt)
    assert handlers() == before
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert set(json.loads((checkpoint / "state.json").read_text())["history"]) == {"0"}
    resumed, result = run(**options, resume_from=find_checkpoint(tmp_path / "run", "latest"))
    assert same(whole, resumed) and result.history == expected.history


def test_a_signal_after_the_last_step_leaves_a_checkpoint_of_it(run, tmp_path):  # noqa: F811
    def interrupt(step):
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun, match="stopped by Ctrl-C after step 1, with a checkpoint"):
        run(max_train_steps=1, on_validation=interrupt)
    resumed, result = run(max_train_steps=1, resume_from=tmp_path / "checkpoint-1")
    assert set(result.history) == {0, 1} and not resumed.model.training


def test_a_second_signal_ends_the_run_at_once(run, tmp_path, in_step, monkeypatch):  # noqa: F811
    monkeypatch.setattr(interrupts, "SAME_SECONDS", 0.0)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = handlers()
    in_step(1, twice)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(max_train_steps=2)
    assert not isinstance(stop.value, InterruptedRun) and not list_checkpoints(tmp_path) and handlers() == before


def test_training_works_in_a_thread(run):  # noqa: F811
    results = []
    thread = threading.Thread(target=lambda: results.append(run(max_train_steps=1, teacher=None)[1]))
    thread.start()
    thread.join()
    assert results[0].steps == 1

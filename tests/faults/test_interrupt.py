"""Signals from outside: one line says how to go on, the status is 128 and the number, and nothing is destroyed."""

import shutil
import signal

import pytest
from faults.harness import assert_same_run, finish
from faults.launches import pixels, recordings

from ofadiff.recordings.folder import recorded_calls
from ofadiff.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

STEP = ("ofadiff.training.train.prediction_loss", 3)


FOLDERS = ("interrupted", "whole")


def last_line(log):
    assert "Traceback" not in log, log
    return log.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_goes_on_from_the_step_that_it_finished(nursery, originals, never_killed, tmp_path, number):
    launch, folder = pixels(originals), tmp_path / "out"
    ended, log = nursery.start(launch.options(folder), STEP, number=number)
    assert ended == [128 + number], log
    said = "after step 3, with a checkpoint: the same command goes on from there with --resume_from_checkpoint latest"
    assert last_line(log) == f"compress_ddpm.py: stopped by {number.name} {said}"
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    finish(nursery, launch, folder)
    assert_same_run(folder, never_killed)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(nursery, originals, tmp_path):
    launch = pixels(originals, processes=2)
    ended, log = nursery.start(launch.options(tmp_path), STEP, number=signal.SIGINT, which=slice(1, 2))
    assert ended == [130, 130], log
    assert log.count("stopped by Ctrl-C after step 3, with a checkpoint") == 1 and "Traceback" not in log
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["ofadiff.runs.sizes.denoising_loss", "ofadiff.correction.correct._measure"])
def test_a_signal_before_training_leaves_nothing(nursery, originals, tmp_path, number, moment):
    launch = pixels(originals, correction_samples=2)
    ended, log = nursery.start(launch.options(tmp_path / "out"), (moment, 1), number=number)
    assert ended == [128 + number] and not (tmp_path / "out").exists(), log
    assert "nothing that was whole is lost: the same command begins again" in last_line(log)


def test_a_signal_in_the_final_save_waits_for_it(nursery, originals, never_killed, tmp_path):
    moment = ("ofadiff.runs.result.model_card", 1)
    ended, log = nursery.start(pixels(originals).options(tmp_path), moment, number=signal.SIGTERM)
    assert ended == [143] and last_line(log) == f"compress_ddpm.py: stopped by SIGTERM, but {tmp_path} is written", log
    assert_same_run(tmp_path, never_killed)


def test_a_recording_that_a_signal_ended_goes_on(nursery, originals, tmp_path):
    def launch(folder):
        return recordings(originals, recordings_dir=tmp_path / folder, max_train_steps=0).options(tmp_path / "out")

    moment = ("ofadiff.pipelines.recording._record_call", 3)
    ended, log = nursery.start(launch("interrupted"), moment, number=signal.SIGINT)
    assert ended == [130] and "the same command begins again" in last_line(log), log
    assert len(recorded_calls(tmp_path / "interrupted")) == 2 and not (tmp_path / "out").exists()
    for folder in FOLDERS:
        ended, log = nursery.start(launch(folder))
        assert ended == [0], log
        shutil.rmtree(tmp_path / "out")
    resumed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()}
        for folder in FOLDERS
    )
    assert whole == resumed

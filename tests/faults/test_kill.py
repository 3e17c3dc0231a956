"""A run that is killed with SIGKILL, however often and wherever, ends as one that was never killed."""

import pytest
from faults.harness import assert_same_run, finish
from faults.launches import pixels

pytestmark = pytest.mark.slow

# One kill after the other, each of them in what the one before had left.
MOMENTS = {
    "in a step": ("ofadiff.training.train.prediction_loss", 3),
    "in a validation": ("ofadiff.training.train.validation_losses", 1),
    "in a checkpoint": ("ofadiff.training.checkpoint.write_whole", 2),
    "before an old checkpoint goes": ("ofadiff.training.checkpoint.remove", 1),
    "in the final save": ("ofadiff.runs.result.model_card", 1),
}


def test_a_killed_run_ends_bit_for_bit_as_if_nothing_had_happened(nursery, originals, never_killed, tmp_path):
    launch, folder = pixels(originals), tmp_path / "killed"
    for name, moment in MOMENTS.items():
        ended, log = nursery.start(launch.options(folder), moment)
        assert ended == [-9], (name, log)
    assert "Resuming from" in finish(nursery, launch, folder)
    assert_same_run(folder, never_killed)

"""Every kind of run, killed KILLS times at random moments: `make faults`."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from faults.harness import ROOT, assert_same_run, finish, tensors_of
from faults.launches import LAUNCHES, pixels

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = int(os.environ.get("KILLS", "20"))

# How far gradients that are summed up by another number of processes may carry weights of the size of 0.1.
ROUNDING = 1e-5


def survive(nursery, launch, folder, seconds, chance, also=()):
    """Starts a run again and again, killed at random moments of what it would take; says how often it was killed."""
    kills = 0
    for _ in range(KILLS):
        begun = any(folder.glob("checkpoint-*"))
        options = launch.options(folder, resume=begun or not also, also=() if begun else also)
        ended, log = nursery.start(options, seconds=chance.uniform(0, seconds))
        assert all(code in (0, -signal.SIGKILL) for code in ended), log
        kills += any(ended)
    return kills


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_run_that_is_killed_at_random_moments_ends_bit_for_bit_as_if_nothing_had_happened(
    nursery, originals, tmp_path, name
):
    launch, chance = LAUNCHES[name](originals), random.Random(name)
    finish(nursery, launch, tmp_path / "whole")
    kills = survive(nursery, launch, tmp_path / "killed", nursery.seconds, chance)
    finish(nursery, launch, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    print(f"{name}: {kills} kills")


def test_an_earlier_output_is_overwritten_whatever_happens(nursery, originals, tmp_path):
    """Until the new run has a checkpoint it is started as it was; what lies there is the old one's or the new one's."""
    launch, folder, chance = pixels(originals), tmp_path / "out", random.Random(0)
    finish(nursery, launch, tmp_path / "whole")
    seconds = nursery.seconds
    finish(nursery, pixels(originals, seed=1), folder)
    moment = ("ofadiff.runs.joint.remove", 2)
    ended, log = nursery.start(launch.options(folder, resume=False, also=["--overwrite_output_dir"]), moment)
    assert ended == [-9], log
    ended, log = nursery.start(launch.options(folder))
    assert (ended == [2] and "its --seed is 1, not 0" in log) or "its seed is 1" in log, log
    moment = ("ofadiff.training.train.prediction_loss", 3)
    ended, log = nursery.start(launch.options(folder, resume=False, also=["--overwrite_output_dir"]), moment)
    assert ended == [-9], log
    survive(nursery, launch, folder, seconds, chance)
    finish(nursery, launch, folder)
    assert_same_run(folder, tmp_path / "whole")


def test_a_run_goes_on_with_another_number_of_processes(nursery, originals, tmp_path):
    """The same samples make the same step; only the order in which gradients are summed up is another."""
    two, one = pixels(originals, processes=2), pixels(originals, train_batch_size=4)
    finish(nursery, two, tmp_path / "whole")
    moment = ("ofadiff.training.train.prediction_loss", 4)
    ended, log = nursery.start(two.options(tmp_path / "killed"), moment)
    assert ended == [-9, -9], log
    finish(nursery, one, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole", close=ROUNDING)
    ours, theirs = (tensors_of(tmp_path / name)[0] for name in ("killed", "whole"))
    farthest = max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
    print(f"another number of processes: {farthest:.1e} apart at most")


def test_interpreters_that_are_started_anew_do_as_well(nursery, originals, never_killed, tmp_path):
    """As a user starts them, without anything of these tests in them."""
    chance, launch = random.Random(0), pixels(originals)
    options = launch.options(tmp_path / "killed")
    command = [sys.executable, str(ROOT / "recipes" / options["recipe"]), *options["words"]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logged = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    for _ in range(KILLS):
        process = subprocess.Popen(command, **logged)
        # Imports take most of the time: from the moment on when there is something to tear.
        while process.poll() is None and not (tmp_path / "killed").exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
    assert subprocess.run(command, **logged).returncode == 0
    assert_same_run(tmp_path / "killed", never_killed)

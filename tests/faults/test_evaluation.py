"""An evaluation in two processes, killed from outside and resumed, is the evaluation of one process in one go."""

import os
import random
import shutil
import time

import pytest
from faults.evaluations import finish, start
from recipes.conftest import fresh_accelerate  # noqa: F401
from recipes.test_evaluate import files, flags, main, on_the_cpu, samples, values  # noqa: F401

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = int(os.environ.get("KILLS", 3))
COUNT = 9
# Five batches: the first process has three of them, the second two.
OPTIONS = {"num_samples": COUNT, "batch_size": 2, "sizes": "0.5", "scheduler": "ddpm", "metrics": "fid kid psnr ssim"}
PICTURES = ("samples.png", "quality_vs_size.png")


def kill_at(words, folder, images):
    """Starts an evaluation in two processes, and kills both when so many images are there, and a new one."""
    images, log = max(images, len(samples(folder)) + 1), folder.with_suffix(".log")
    processes = start(words, log)
    while len(samples(folder)) < images and any(process.is_alive() for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert all(process.exitcode <= 0 for process in processes), log.read_text()


def test_killed_in_two_processes_and_resumed_in_one_or_two(flags, tmp_path):  # noqa: F811
    main(flags(output_dir=tmp_path / "whole", **OPTIONS))
    whole = samples(tmp_path / "whole")
    assert len(whole) == 2 * COUNT
    killed, chance, left = tmp_path / "killed", random.Random(0), {}
    # In order, so that each start goes on from where the last one was killed; at last with nothing left to sample.
    moments = chance.sample(range(1, len(whole)), min(KILLS, len(whole)) - 1)
    for images in [*sorted(moments), len(whole)]:
        if len(left) < len(whole):
            kill_at(flags(output_dir=killed, **OPTIONS), killed, images)
            left = samples(killed)
            assert len(left) >= images and left.items() <= whole.items()
    for processes in (1, 2):
        folder = tmp_path / f"resumed-{processes}"
        shutil.copytree(killed, folder)
        for path in samples(folder):  # not only what the last kill left
            if chance.random() < 0.3:
                (folder / path).unlink()
        finish(flags(output_dir=folder, **OPTIONS), folder.with_suffix(".log"), processes)
        assert samples(folder) == whole and values(folder) == values(tmp_path / "whole")
        assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
        for name in PICTURES:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

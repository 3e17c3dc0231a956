"""An evaluation in two processes, killed from outside and resumed, is the evaluation of one process in one go."""

import os
import random
import shutil
import sys
import time

import psutil
import pytest
from recipes.conftest import ROOT, fresh_accelerate, launch  # noqa: F401
from recipes.test_evaluate import DRIVER, files, flags, main, on_the_cpu, samples, values  # noqa: F401

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = int(os.environ.get("KILLS", 3))
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
COUNT = 9
# Five batches: the first process has three of them, the second two.
OPTIONS = {"num_samples": COUNT, "batch_size": 2, "sizes": "0.5", "scheduler": "ddpm", "metrics": "fid kid psnr ssim"}
PICTURES = ("samples.png", "quality_vs_size.png")


def kill_at(words, folder, images):
    """Starts an evaluation in two processes, and kills all of it when so many images are there, and a new one."""
    images = max(images, len(samples(folder)) + 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "w") as log:
        started = psutil.Popen([sys.executable, *TWO, *words], env=environment, stdout=log, stderr=log)
        while len(samples(folder)) < images and started.poll() is None:
            time.sleep(0.01)
        # The launcher first, lest it sees the others end.
        for process in (started, *started.children(recursive=True)):
            process.kill()
        started.wait()
    assert started.returncode <= 0, folder.with_suffix(".log").read_text()


def test_killed_in_two_processes_and_resumed_in_one_or_two(flags, launch, tmp_path):  # noqa: F811
    main(flags(output_dir=tmp_path / "whole", **OPTIONS))
    whole = samples(tmp_path / "whole")
    assert len(whole) == 2 * COUNT
    (tmp_path / "driver.py").write_text(DRIVER)
    killed, chance, left = tmp_path / "killed", random.Random(0), {}
    words = [str(tmp_path / "driver.py"), *flags(output_dir=killed, **OPTIONS)]
    # In order, so that each start goes on from where the last one was killed; at last with nothing left to sample.
    moments = chance.sample(range(1, len(whole)), min(KILLS, len(whole)) - 1)
    for images in [*sorted(moments), len(whole)]:
        if len(left) < len(whole):
            kill_at(words, killed, images)
            left = samples(killed)
            assert len(left) >= images and left.items() <= whole.items()
    for processes in (1, 2):
        folder = tmp_path / f"resumed in {processes}"
        shutil.copytree(killed, folder)
        for path in samples(folder):  # not only what the last kill left
            if chance.random() < 0.3:
                (folder / path).unlink()
        resumed = flags(output_dir=folder, **OPTIONS)
        if processes == 1:
            main(resumed)
        else:
            done = launch(tmp_path / "driver.py", resumed, TWO)
            assert done.returncode == 0, done.stderr
        assert samples(folder) == whole and values(folder) == values(tmp_path / "whole")
        assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
        for name in PICTURES:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

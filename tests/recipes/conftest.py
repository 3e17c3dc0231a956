"""What the recipes' tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.conftest import fresh_accelerate  # noqa: F401

ROOT = Path(__file__).parents[2]
# A recipe imports its neighbours: Python puts a script's own folder first on the path.
sys.path.insert(0, str(ROOT / "recipes"))


@pytest.fixture
def launch():
    """Runs a recipe as its user does: `launch(recipe, words, launcher=(), **environment)`."""

    def launch(recipe, words, launcher=(), **environment):
        command = [sys.executable, *launcher, str(ROOT / "recipes" / recipe), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return launch


@pytest.fixture(scope="session")
def words():
    """Turns options into a command line: flags without their dashes, None leaves one out, a list is several words."""

    def words(options):
        line = []
        for name, value in options.items():
            values = value if isinstance(value, list) else str(value).split()
            line += [] if value is None else [f"--{name}", *([] if value is True else map(str, values))]
        return line

    return words

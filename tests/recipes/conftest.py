"""What the recipes' tests share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.conftest import fresh_accelerate  # noqa: F401

from ofadiff.commands.command import call, script

ROOT = Path(__file__).parents[2]

# The function that each recipe runs.
FUNCTIONS = {
    "compress_ddpm.py": "compress",
    "compress_dit.py": "compress",
    "compress_sd.py": "compress",
    "compress_any.py": "compress",
    "finetune_size.py": "heal",
    "extract.py": "extract",
    "evaluate.py": "evaluate_checkpoint",
    "architectures.py": "write_architectures",
    "demo.py": "demo",
}


@pytest.fixture
def launch():
    """Runs a recipe as its user does: `launch(recipe, words, launcher=(), **environment)`."""

    def launch(recipe, words, launcher=(), **environment):
        command = [sys.executable, *launcher, str(ROOT / "recipes" / recipe), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return launch


@pytest.fixture
def fork(nursery):
    """Runs a recipe in two processes, without seconds for their imports: `fork(recipe, words, sharded=False)`.

    Gives how they ended, and what they said.
    """

    def fork(recipe, words, sharded=False):
        order = {"recipe": str(recipe), "words": list(map(str, words)), "processes": 2, "sharded": sharded}
        return nursery.start(order)

    return fork


def load_recipe(name):
    """The application of a recipe, in this process."""
    path = ROOT / "recipes" / name
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return script(getattr(module, FUNCTIONS[name]), str(path))


@pytest.fixture(scope="session")
def recipe():
    """Runs a recipe in this process: `recipe(name, words)` returns and raises what its function does."""
    return lambda name, words: call(load_recipe(name), words)


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

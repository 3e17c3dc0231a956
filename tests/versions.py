"""What tests do without where the installed versions are older than the ones that they name."""

import importlib
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version

# The versions that the tests' names are of. In these, or newer ones, a name that is not there is an error.
NAMES_OF = {"diffusers": "0.42", "transformers": "5.0", "gradio": "6.31", "torch": "2.9"}


def since(path: str) -> Any:
    """A class, function or module by its path, `diffusers.ZImagePipeline`; the test skips where it came later."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        skip_if_older(module.partition(".")[0], name)
        raise


def importable(name: str) -> ModuleType | None:
    """A module, None where there is none of the name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def needs_torchao() -> ModuleType:
    """torchao's quantization; diffusers before 0.37 cannot be imported beside the torchao that has all of its names."""
    return pytest.importorskip("torchao.quantization", reason="needs pip install torchao")


def skip_if_older(package: str, name: str) -> None:
    """Skips the test if a package is older than the one whose names the tests know."""
    installed = importlib.import_module(package).__version__
    if Version(installed) < Version(NAMES_OF[package]):
        pytest.skip(f"{package} {installed} has no {name}; a newer one has")

"""Names of the package."""

import importlib
import pkgutil
import types
import warnings

import ofadiff


def test_no_name_shadows_a_module():
    for module in pkgutil.walk_packages(ofadiff.__path__, "ofadiff."):
        parent, _, name = module.name.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported = importlib.import_module(module.name)
        found = getattr(importlib.import_module(parent), name)
        assert isinstance(found, types.ModuleType) and found is imported, module.name


def test_public_names():
    assert all(callable(getattr(ofadiff, name)) for name in ofadiff.__all__)

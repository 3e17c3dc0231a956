"""Modules by the names that they had before they moved: `import ofadiff.cost` still works.

Importing a submodule by name asks for a module of that name, which no attribute of the package can answer; so this is a
finder. It knows the names in `MOVED` and no others, and gives each a module whose names are those of the new ones.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

# Where the names of a module are now; the first of these modules that has a name answers for it.
MOVED: dict[str, tuple[str, ...]] = {
    "ofadiff.cost": ("profiling.cost", "profiling.latency"),
    "ofadiff.elastic": ("cutting",),
    "ofadiff.extracted": ("extraction.extracted_model", "extraction.subnet", "extraction.reader"),
    "ofadiff.files": ("storage.files",),
    "ofadiff.inputs": ("denoisers.inputs", "denoisers.old_tables"),
    "ofadiff.latency": ("profiling.latency",),
    "ofadiff.rotation": ("basis.rotation",),
    "ofadiff.size_adapter": ("adapters.size_adapter",),
    "ofadiff.structure": ("storage.structure",),
    "ofadiff.timing": ("profiling.timing",),
    "ofadiff.evaluation.clip_score": ("evaluation.metrics.clip_scorer", "evaluation.metrics.clip_score"),
    "ofadiff.evaluation.consistency": ("evaluation.metrics.consistency",),
    "ofadiff.evaluation.denoiser": ("denoisers.pipelines",),
    "ofadiff.evaluation.extractors": ("evaluation.metrics.extractors",),
    "ofadiff.evaluation.feature_statistics": ("evaluation.metrics.feature_statistics",),
    "ofadiff.evaluation.fid": ("evaluation.metrics.fid",),
    "ofadiff.evaluation.kid": ("evaluation.metrics.kid",),
    "ofadiff.evaluation.measure": ("profiling.memory",),
    "ofadiff.evaluation.prompts": ("data.prompts",),
    "ofadiff.training.copies": ("denoisers.copies",),
    "ofadiff.training.data": ("data.images", "data.image_data", "data.hub_datasets", "data.order"),
    "ofadiff.training.encoder": ("denoisers.encoder",),
    "ofadiff.training.families": ("denoisers.old_tables",),
    "ofadiff.training.flow_matching": ("noise.flow_matching",),
    "ofadiff.training.latent_cache": ("data.latent_cache",),
    "ofadiff.training.stream": ("data.captioned_stream", "data.stream"),
    "ofadiff.training.text_to_image": ("data.captioned_images", "data.captions"),
    "ofadiff.unet_elastic.verify": ("verification",),
}


class OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of `MOVED`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        """A spec for the names in `MOVED`, None for all others."""
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Gives the module the names of those that took its place."""
        moved = [importlib.import_module(f"ofadiff.{name}") for name in MOVED[module.__name__]]
        names = {name: value for new in reversed(moved) for name, value in vars(new).items() if name[:2] != "__"}
        vars(module).update(names)
        module.__doc__ = f"Moved to {', '.join(new.__name__ for new in moved)}."


def install() -> None:
    """Makes the old names importable, once."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())

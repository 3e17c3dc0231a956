"""Which component of a pipeline denoises, and how many classes it knows."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ofadiff.denoisers.table import component_names, kind_of_model
from ofadiff.reading.json_file import shown
from ofadiff.stand_ins.equality import stock_class
from ofadiff.storage.model_classes import MODEL_CLASSES, model_class
from ofadiff.storage.pipeline_index import read_index
from ofadiff.supernet_model import unwrapped

# Where diffusers keeps its denoisers; a few lie beside their pipeline, under such names.
PACKAGES = ("diffusers.models.transformers.", "diffusers.models.unets.")
PIPELINES, NAMES = "diffusers.pipelines.", ("UNet", "Transformer")

# Classes there that are parts of a denoiser and never one.
PARTS = {
    "DreamLiteTransformer2DModel",
    "MiniMaxMusic3RVQDepthDecoder",
    "MotionAdapter",
    "Transformer2DModel",
    "TransformerTemporalModel",
}


def is_denoiser(model_class: Any) -> bool:
    """Whether a class is one of denoisers: diffusers', or one of `MODEL_CLASSES`."""
    if not (inspect.isclass(model_class) and issubclass(model_class, ModelMixin)):
        return False
    stock = stock_class(model_class)
    if stock in MODEL_CLASSES.values():
        return True
    beside = stock.__module__.startswith(PIPELINES) and any(word in stock.__name__ for word in NAMES)
    return (stock.__module__.startswith(PACKAGES) or beside) and stock.__name__ not in PARTS


def find_component(components: Mapping[str, Any], component: str | None, pipeline: str) -> str:
    """What a pipeline calls its denoiser.

    Args:
        components: The pipeline's components, or their classes, by name; compiled and wrapped ones too.
        component: The one that is meant; needed where there are several.
        pipeline: Class of the pipeline, for errors.

    Raises:
        ValueError: If it is none, or there is none, or several and none is named.
    """
    found = [
        name
        for name, part in components.items()
        if is_denoiser(part if inspect.isclass(part) else type(unwrapped(part)))
    ]
    if component is not None:
        if not isinstance(component, str) or component not in found:
            raise ValueError(
                f"component is {shown(component)}, which is no denoiser of this {pipeline}; it has "
                f"{' and '.join(found) or 'none'}"
            )
        return component
    if len(found) > 1:
        raise ValueError(f"this {pipeline} has several denoisers, {' and '.join(found)}; say which one with component")
    if not found:
        raise ValueError(f"this {pipeline} has no denoiser among its components {', '.join(components)}")
    return found[0]


def class_of_component(library: str, name: str) -> Any:
    """The class that a pipeline's `model_index.json` names for a component; None if it is not of diffusers or known
    here.
    """
    return model_class(name) if name in MODEL_CLASSES or _is_of_diffusers(library) else None


def check_found_by_diffusers(folder: Path, component: str, denoiser: type[ModelMixin]) -> None:
    """Checks that diffusers will find the class that a pipeline's `model_index.json` names for its denoiser.

    Args:
        folder: The pipeline's folder.
        component: What the pipeline calls the denoiser.
        denoiser: The denoiser's class.

    Raises:
        ValueError: If the module that is named is not imported, or lacks the class or `ModelMixin`.
    """
    index = folder / "model_index.json"
    library, name = read_index(folder)[component]
    if library is None or _is_of_diffusers(library):
        return
    module = sys.modules.get(library)
    named = f"{index} names {name} of the module {library!r} for its {component}"
    own = stock_class(denoiser).__module__
    if getattr(module, name, None) is None:
        lacks = "is not imported" if module is None else "has no such class"
        where = "import it first" if own == library else f"the class is in {own!r}, so write that in its place"
        raise ValueError(f"{named}, which {lacks}; {where}")
    if getattr(module, "ModelMixin", None) is None:
        raise ValueError(
            f"{named}, which lacks ModelMixin; diffusers looks for it beside the class, so have that module import it: "
            "`from diffusers import ModelMixin`"
        )


def _is_of_diffusers(library: str) -> bool:
    """Whether a module that `model_index.json` names is diffusers, or the module of one of its pipelines."""
    # A few denoisers lie beside their pipeline, whose module is named then.
    return library == "diffusers" or ("." not in library and find_spec(f"{PIPELINES}{library}") is not None)


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The denoiser among a pipeline's components.

    Raises:
        ValueError: If there is none.
    """
    for name in component_names():
        if isinstance(pipeline.components.get(name), nn.Module):
            return pipeline.components[name]
    return pipeline.components[find_component(pipeline.components, None, type(pipeline).__name__)]


def class_count(denoiser: nn.Module) -> int | None:
    """How many classes a denoiser is conditioned on; None if it is unconditional, or takes any number."""
    kind = kind_of_model(denoiser)
    known = None if kind is None or kind.classes is None else kind.classes(denoiser)
    return None if known is None or known == math.inf else int(known)

"""The table of denoisers, and who is looked up in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ofadiff.denoisers.auraflow import AURAFLOW
from ofadiff.denoisers.cogvideox import COGVIDEOX
from ofadiff.denoisers.dit import DIT
from ofadiff.denoisers.flux import FLUX
from ofadiff.denoisers.flux2 import FLUX_2
from ofadiff.denoisers.hunyuan_dit import HUNYUAN_DIT
from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.ltx import LTX
from ofadiff.denoisers.lumina2 import LUMINA_2
from ofadiff.denoisers.pixart import PIXART_SIGMA
from ofadiff.denoisers.qwen_image import QWEN_IMAGE
from ofadiff.denoisers.sana import SANA
from ofadiff.denoisers.sd3 import STABLE_DIFFUSION_3
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.denoisers.unet_2d_condition import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from ofadiff.denoisers.uvit_2d import UVIT_2D
from ofadiff.denoisers.wan import WAN

# A new kind of denoiser is one file and one line here.
DENOISERS: dict[str, DenoiserKind] = {
    "unet_2d": UNET_2D,
    "dit": DIT,
    "stable_diffusion": STABLE_DIFFUSION,
    "stable_diffusion_xl": STABLE_DIFFUSION_XL,
    "stable_diffusion_3": STABLE_DIFFUSION_3,
    "flux": FLUX,
    "sana": SANA,
    "pixart_sigma": PIXART_SIGMA,
    "auraflow": AURAFLOW,
    "cogvideox": COGVIDEOX,
    "flux_2": FLUX_2,
    "hunyuan_dit": HUNYUAN_DIT,
    "ltx": LTX,
    "lumina_2": LUMINA_2,
    "qwen_image": QWEN_IMAGE,
    "uvit_2d": UVIT_2D,
    "wan": WAN,
}


def kind_of_model(model: nn.Module) -> DenoiserKind | None:
    """The first kind of a denoiser's class, or of one that it is derived from; None if there is none."""
    for known in type(model).__mro__:
        for kind in DENOISERS.values():
            if kind.model == known.__name__:
                return kind
    return None


def kind_of_pipeline(index: Mapping[str, Any], kinds: Iterable[DenoiserKind]) -> tuple[DenoiserKind, str] | None:
    """How a pipeline calls its denoiser, and under which name it has it.

    Args:
        index: What its `model_index.json` says.
        kinds: Kinds that come into question.

    Returns:
        None if none of them fits.
    """
    parts = {name: value[1] for name, value in index.items() if isinstance(value, (list, tuple)) and value[1]}
    for kind in kinds:
        component = kind.components.get(index["_class_name"])
        if component is None and kind.pixels_as is not None and set(parts) == {kind.pixels_as, "scheduler"}:
            component = kind.pixels_as
        if component is not None and parts.get(component) == kind.model:
            return kind, component
    return None


def component_names() -> tuple[str, ...]:
    """What pipelines call their denoisers."""
    kinds = DENOISERS.values()
    names = [name for kind in kinds for name in (kind.pixels_as, *kind.components.values())]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def trainable_kinds(condition: str | None = None) -> list[DenoiserKind]:
    """The kinds that can be trained; of those that are conditioned on something, if it is given."""
    return [kind for kind in DENOISERS.values() if kind.arguments is not None and condition in (None, kind.condition)]


def pipelines_in_words(kinds: Iterable[DenoiserKind]) -> str:
    """The pipelines of some kinds, for an error."""
    kinds = list(kinds)
    named = dict.fromkeys(pipeline for kind in kinds for pipeline in kind.components)
    words = [f"a {' or '.join(named)}"] if named else []
    for component in dict.fromkeys(kind.pixels_as for kind in kinds if kind.pixels_as is not None):
        models = dict.fromkeys(kind.model for kind in kinds if kind.pixels_as == component)
        words.append(f"a pipeline of a scheduler and a {' or '.join(models)} as its {component}")
    return ", or ".join(words)

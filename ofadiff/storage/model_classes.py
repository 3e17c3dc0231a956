"""Classes of denoisers that diffusers does not ship, by the name that their `config.json` says."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import ModelMixin

# A class of one's own is one line: `MODEL_CLASSES["UViT"] = UViT`. Its name may be none of diffusers'.
MODEL_CLASSES: dict[str, type[ModelMixin]] = {}


def model_class(name: Any) -> type[ModelMixin] | None:
    """The denoiser class of a name, here or in diffusers; None if there is none."""
    found = MODEL_CLASSES.get(name) or getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None

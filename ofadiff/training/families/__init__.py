"""The kinds of text-to-image pipelines that can be trained, and the table of them."""

from __future__ import annotations

from ofadiff.training.families.family import Family, pack_latents
from ofadiff.training.families.flux import FLUX
from ofadiff.training.families.pixart import PIXART_SIGMA
from ofadiff.training.families.sana import SANA
from ofadiff.training.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from ofadiff.training.families.stable_diffusion_3 import STABLE_DIFFUSION_3

__all__ = ["FAMILIES", "Family", "pack_latents"]

# By the name of the pipeline class. Another kind is one file and one entry here.
FAMILIES = {
    family.pipeline_class.__name__: family
    for family in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX, SANA, PIXART_SIGMA)
}

"""The kinds of text-to-image pipelines that can be trained, and the table of them."""

from __future__ import annotations

from ofadiff.denoisers.family import Family, pack_latents
from ofadiff.denoisers.flux import FLUX
from ofadiff.denoisers.pixart import PIXART_SIGMA
from ofadiff.denoisers.sana import SANA
from ofadiff.denoisers.sd3 import STABLE_DIFFUSION_3
from ofadiff.denoisers.unet_2d_condition import STABLE_DIFFUSION, STABLE_DIFFUSION_XL

__all__ = ["FAMILIES", "Family", "pack_latents"]

# By the name of the pipeline class. Another kind is one file and one entry here.
FAMILIES = {
    family.pipeline_class.__name__: family
    for family in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX, SANA, PIXART_SIGMA)
}

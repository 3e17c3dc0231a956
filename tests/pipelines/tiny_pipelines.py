"""Tiny Stable Diffusion checkpoints with sizes, and images of them."""

import numpy as np
import torch
from conftest import make_supernet
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_stable_diffusion import save_stable_diffusion

from ofadiff import OFAPipeline

SIZES = (0.6, 1.0)
noise = np.random.default_rng(0)
PICTURE = Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((8, 8), dtype=np.uint8)))


def make_checkpoint(folder, save=save_stable_diffusion, **changes):
    save(folder, **changes)
    supernet = make_supernet(UNet2DConditionModel.from_pretrained(folder / "unet"), sizes=SIZES)
    supernet.save_pretrained(folder / "unet")
    return folder


def load(folder, **options):
    return OFAPipeline.from_pretrained(folder, safety_checker=None, **options)


def image(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a b", "num_inference_steps": 2, "output_type": "np", **arguments}
    return pipeline(generator=torch.Generator().manual_seed(0), **arguments).images

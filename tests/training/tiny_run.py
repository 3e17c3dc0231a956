"""A tiny class-conditional teacher, its supernet, and noise for images."""

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import Images
from ofadiff.training.bundles import Objective, Schedule, Watching
from ofadiff.training.train import train


def make_teacher(dropout=0.0):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        dropout=dropout,
    ).eval()


def make_supernet(sizes=(0.5, 0.75, 1.0), **options):
    unet = make_teacher(**options)
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="magnitude")
    return Supernet(unet, groups, scores, allocate(unet, groups, scores, sizes))


def noise_image(index):
    pixels = np.random.default_rng(index).integers(0, 255, (10, 8), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_data():
    """Labelled noise, for training and validation."""
    images = Images([f"{index}" for index in range(20)], noise_image, [index % 3 for index in range(20)])
    return ImageData(images, resolution=8, channels=1, indices=range(14)), ImageData(
        images, resolution=8, channels=1, indices=range(14, 20)
    )


def train_with(supernet, data, prepare, optimizer, lr_scheduler, accelerator, output_dir, resume_from=None, **options):
    """`train` with the fields of its bundles as keywords."""
    bundles = []
    for bundle in (Objective, Schedule, Watching):
        own = {name: options.pop(name) for name in [*options] if name in bundle.__dataclass_fields__}
        bundles.append(bundle(**own, **({"prepare": prepare} if bundle is Objective else {})))
    assert not options
    objective, *rest = bundles
    built = optimizer, lr_scheduler, accelerator
    return train(supernet, *data, objective, *built, output_dir, *rest, resume_from)

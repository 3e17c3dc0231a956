import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

from ofadiff import OFAPipeline
from ofadiff.evaluation import register_extractor
from ofadiff.pipelines import ClassConditionalDDPMPipeline


def make_teacher():
    torch.manual_seed(0)
    return plain_unet(in_channels=1, out_channels=1, num_class_embeds=10).eval()


class TinyFeatures(nn.Module):
    """Six fixed features of an image: random projections of its 4x4 averages."""

    def __init__(self):
        super().__init__()
        projection = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        self.projection = nn.Parameter(projection)

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.projection


@pytest.fixture(scope="session", autouse=True)
def tiny_extractor():
    register_extractor("tiny", TinyFeatures())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A class-conditional OFA checkpoint of grey 16x16 images, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    DDPMPipeline(make_teacher(), DDIMScheduler()).save_pretrained(folder / "teacher")
    unet = make_teacher()
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(folder / "ofa")
    supernet.save_pretrained(folder / "ofa" / "unet")
    return folder


@pytest.fixture(scope="session")
def pipeline(checkpoint):
    return OFAPipeline.from_pretrained(checkpoint / "ofa")


@pytest.fixture(scope="session")
def teacher(pipeline):
    return ClassConditionalDDPMPipeline(make_teacher(), pipeline.scheduler)

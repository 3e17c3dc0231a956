"""Tiny real denoisers: the shapes of plain and scale-shift UNet2DModel, Stable Diffusion 1.x and SDXL."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ofadiff import Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.basis.change import change_module, change_of_basis
from ofadiff.channels import slices_by_module
from ofadiff.denoisers.inputs import example_inputs

torch.set_num_threads(1)

SIZES = (0.45, 0.7, 1.0)


def plain_unet(**changes: Any) -> UNet2DModel:
    """A `UNet2DModel` with self-attention, 16x16 RGB."""
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes})


def scale_shift_unet() -> UNet2DModel:
    """A class-conditional `UNet2DModel` with scale-shift norms and resampling residual blocks."""
    return plain_unet(
        num_class_embeds=10,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )


def sd15_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.x in small: convolution projections, one transformer block per attention, GEGLU."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL in small: linear projections, several transformer blocks per attention, added text and size embeddings."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


MODELS: dict[str, Callable[[], ModelMixin]] = {
    "plain": plain_unet,
    "scale_shift": scale_shift_unet,
    "sd15": sd15_unet,
    "sdxl": sdxl_unet,
}


# Whoever edits is content with the first.
PARAMS = [name if name == "plain" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.fixture(params=PARAMS)
def unet(request: pytest.FixtureRequest) -> ModelMixin:
    """One of the four tiny denoisers, in eval mode, the same weights in every test."""
    return make_unet(request.param)


@pytest.fixture
def mac_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second passes with every MAC, none with anything else, so that timing once is enough."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        monkeypatch.setattr("ofadiff.profiling.timing.time.perf_counter", lambda: counter.get_total_flops() / 2)
        for constant, count in {
            "profiling.timing.REPEATS": 1,
            "profiling.timing.WARM_UP": 0,
            "profiling.latency.WARM_UP": 0,
            "profiling.latency.BLOCK_ROUNDS": 1,
        }.items():
            monkeypatch.setattr(f"ofadiff.{constant}", count)
        yield


def make_unet(name: str) -> ModelMixin:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def random_inputs(model: ModelMixin, batch_size: int = 2, seed: int = 0) -> dict[str, Any]:
    """Forward arguments with noise in every floating-point tensor and small integers in the others."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(entry) for key, entry in value.items()}
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        return torch.randint(0, 10, value.shape, generator=generator)

    return fill(example_inputs(model, batch_size))


def output(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    """The denoiser's prediction, without a gradient."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def squared_output_loss(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss of every sample, `(N,)`, that depends on every weight."""
    return model(**inputs, return_dict=False)[0].float().square().flatten(1).mean(1)


def make_supernet(model: ModelMixin, sizes: tuple[float, ...] = SIZES, rotate: bool = True) -> Supernet:
    """The whole path up to the supernet, with Taylor scores from one batch."""
    groups = find_channel_groups(model)
    if rotate:
        rotate_attention(model, groups)
    scores = score_channels(model, groups, [random_inputs(model, seed=1)], squared_output_loss)
    return Supernet(model, groups, scores, allocate(model, groups, scores, sizes=sizes))


def make_dropping_supernet(model: ModelMixin, sizes: tuple[float, ...] = SIZES) -> Supernet:
    """A supernet some of whose branches matter so little that small sizes drop them."""
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    for number, group in enumerate(groups):
        scores[group.name] = scores[group.name] * (1, 8, 0.05, 3)[number % 4]
    return Supernet(model, groups, scores, allocate(model, groups, scores, sizes=sizes, min_keep=0))


def sliced(fused: ModelMixin, directory: Path) -> Supernet:
    """A supernet made of another model in a checkpoint's own order and basis.

    Made of the original with a LoRA fused into it, it is what the LoRA has to act as.
    """
    reference = Supernet.from_pretrained(directory)
    with torch.no_grad():
        for parameter, original in zip(reference.model.parameters(), fused.parameters(), strict=True):
            parameter.copy_(original)
    for module, cuts in slices_by_module(reference.groups).items():
        for group, part in cuts:
            change_module(reference.model.get_submodule(module), part, change_of_basis(group, part, reference.basis))
    return reference


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """The process that recipes are forked from; see `faults.harness.Nursery`."""
    from faults.harness import Nursery

    with Nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started

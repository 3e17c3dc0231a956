"""What else is done to a denoiser, with sizes: the time of a sampling's forwards with it over that without it.

The supernet is at the smaller of its sizes, and the extracted model of that size runs beside it. Caches skip what they
find to have changed little, which depends on the model: the table says in how many steps the last attention ran.

pip install DeepCache tomesd
python benchmarks/composing.py --rounds 5
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    MagCacheConfig,
    ModelMixin,
    NucleusMoEImageTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from side_by_side import Comparison, main
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.extraction.extracted_model import WIDTHS_KEY
from ofadiff.layers import cut_once

SIZE = 0.6
STEPS, FEW_STEPS, QUICK_STEPS = 12, 4, 3

Inputs = dict[str, Any]


@dataclass
class Case:
    """A denoiser, and what is done to it.

    Attributes:
        denoiser: Makes it, tiny or not.
        inputs: Makes the arguments of its forward, but for the time.
        ways: What is done to it, by name: changes the model that it is given, in place.
    """

    denoiser: Callable[[bool], ModelMixin]
    inputs: Callable[[bool], Inputs]
    ways: dict[str, Callable[[Any], None]]


class Clock:
    """The timestep of the forward that runs."""

    now = 0.0


def flux(quick: bool) -> FluxTransformer2DModel:
    heads, layers = (4, 1) if quick else (8, 2)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


def flux_inputs(quick: bool) -> Inputs:
    side = torch.arange(4.0 if quick else 8.0)
    places = torch.stack(
        [torch.zeros(len(side) ** 2), *(axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))], 1
    )
    return {
        "hidden_states": torch.randn(1, len(places), 16),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": places,
        "txt_ids": torch.zeros(32, 3),
    }


def cogvideox(quick: bool) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=4 if quick else 8,
        attention_head_dim=32,
        num_layers=2 if quick else 4,
        in_channels=4,
        out_channels=4,
        text_embed_dim=64,
        time_embed_dim=64,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
    )


def cogvideox_inputs(quick: bool) -> Inputs:
    return {"hidden_states": torch.randn(2, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 16, 64)}


def wan(quick: bool) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4 if quick else 8,
        attention_head_dim=32,
        num_layers=2 if quick else 4,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256 if quick else 1024,
    )


def wan_inputs(quick: bool) -> Inputs:
    return {"hidden_states": torch.randn(1, 4, 3, 16, 16), "encoder_hidden_states": torch.randn(1, 16, 64)}


def nucleus(quick: bool) -> NucleusMoEImageTransformer2DModel:
    return NucleusMoEImageTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        num_layers=2 if quick else 4,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
        moe_enabled=False,
    )


def nucleus_inputs(quick: bool) -> Inputs:
    side = 4 if quick else 8
    return {
        "hidden_states": torch.randn(1, side * side, 16),
        "encoder_hidden_states": torch.randn(1, 64, 64),
        "img_shapes": [(1, side, side)],
    }


def unet(quick: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8 if quick else 16,
        block_out_channels=(32, 64) if quick else (64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def unet_inputs(quick: bool) -> Inputs:
    side = 8 if quick else 16
    return {"sample": torch.randn(2, 4, side, side), "encoder_hidden_states": torch.randn(2, 16, 64)}


def load_lcm_lora(model: Any) -> None:
    """A LoRA of the original, as LCM-LoRA is one."""
    original = {name: value for name, value in model.config.items() if name != WIDTHS_KEY}
    adapted = UNet2DConditionModel.from_config(original)
    adapted.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]))
    model.load_lora_adapter(get_peft_model_state_dict(adapted), prefix=None)


def enable_deepcache(steps: int, model: Any) -> None:
    from DeepCache import DeepCacheSDHelper

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=scheduler))
    helper.set_params(cache_interval=3)
    helper.enable()


def merge_tokens(model: Any) -> None:
    import tomesd

    tomesd.apply_patch(model, ratio=0.5, use_rand=False)


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)


def cached(config: Any) -> Callable[[Any], None]:
    return lambda model: model.enable_cache(config)


def cases(steps: int) -> list[Case]:
    now = {"current_timestep_callback": lambda: Clock.now}
    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950), **now
    )
    on_flux = {
        "Pyramid Attention Broadcast": cached(broadcast),
        "First Block Cache": cached(FirstBlockCacheConfig(threshold=0.5)),
        "TaylorSeer": cached(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)),
        "MagCache": cached(MagCacheConfig(num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS)),
    }
    faster = {"FasterCache": cached(FasterCacheConfig(tensor_format="BFCHW", **now))}
    on_unet = {
        "layerwise casting": cast,
        "int8 weights": lambda model: quantize_(model, Int8WeightOnlyConfig()),
        "int8 weights and activations": lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
        "float8 weights": lambda model: quantize_(model, Float8WeightOnlyConfig()),
        "LCM-LoRA": load_lcm_lora,
    }
    if importlib.util.find_spec("DeepCache"):
        on_unet["DeepCache"] = partial(enable_deepcache, steps)
    if importlib.util.find_spec("tomesd"):
        on_unet["token merging"] = merge_tokens
    return [
        Case(flux, flux_inputs, on_flux),
        Case(cogvideox, cogvideox_inputs, faster),
        Case(wan, wan_inputs, {"SeaCache": cached(SeaCacheConfig(threshold=1.0))}),
        Case(nucleus, nucleus_inputs, {"text keys and values": cached(TextKVCacheConfig())}),
        Case(unet, unet_inputs, on_unet),
    ]


def make_sizes(model: ModelMixin, inputs: Inputs) -> Supernet:
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="magnitude")
    inputs = {**inputs, "timestep": torch.full((batch_of(inputs),), 500.0)}
    return Supernet(
        model, groups, scores, allocate(model, groups, scores, (SIZE, 1.0), budget="channels", inputs=inputs)
    )


def batch_of(inputs: Inputs) -> int:
    return len(inputs["encoder_hidden_states"])


@torch.no_grad()
def sample(model: Any, inputs: Inputs, steps: int) -> None:
    """A sampling's forwards."""
    name = next(iter(inputs))
    latents, rest = inputs[name], {key: value for key, value in inputs.items() if key != name}
    share = isinstance(model, FluxTransformer2DModel | NucleusMoEImageTransformer2DModel)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    for step, time in enumerate(scheduler.timesteps):
        Clock.now = float(time)
        with in_context(model, step, steps):
            if isinstance(model, UNet2DConditionModel):  # as pipelines call it, which DeepCache and tomesd rely on
                prediction = model(latents, time, **rest, return_dict=False)[0]
            else:
                moment = torch.full((batch_of(inputs),), Clock.now / (1000 if share else 1))
                prediction = model(**{name: latents}, timestep=moment, **rest, return_dict=False)[0]
        if prediction.shape == latents.shape:
            latents = latents - 0.02 * prediction
    if "_cache_config" in vars(model):
        model._reset_stateful_cache()


def in_context(model: Any, step: int, steps: int) -> Any:
    if "_cache_config" not in vars(model):
        return nullcontext()
    return model.cache_context("cond", step_index=step, num_inference_steps=steps, sigma=Clock.now / 1000)


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """How often the last attention of a denoiser makes queries."""
    calls: list[int] = []
    *_, last = (module for name, module in model.named_modules() if name.endswith(("attn.to_q", "attn1.to_q")))
    handle = last.register_forward_hook(lambda *call: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def compare(comparison: Comparison) -> None:
    for case in cases(QUICK_STEPS if comparison.quick else STEPS):
        torch.manual_seed(0)
        model = case.denoiser(comparison.quick).eval()
        inputs = case.inputs(comparison.quick)
        supernet = make_sizes(model, inputs)
        supernet.set_size(SIZE)
        extracted = supernet.extract(SIZE)
        for name, way in case.ways.items():
            compare_way(comparison, (supernet, extracted), inputs, name, way)


def compare_way(
    comparison: Comparison,
    models: tuple[Supernet, ModelMixin],
    inputs: Inputs,
    name: str,
    way: Callable[[Any], None],
) -> None:
    supernet, extracted = models
    steps = QUICK_STEPS if comparison.quick else STEPS
    its_steps = FEW_STEPS if name == "LCM-LoRA" else steps
    small = copy.deepcopy(extracted)
    way(small)
    sides = {"size with": partial(sample, small, inputs, its_steps), "size": partial(sample, extracted, inputs, steps)}
    if name != "float8 weights":
        changed = copy.deepcopy(supernet.model)
        way(changed)
        sides["sizes"] = held(partial(sample, supernet.model, inputs, steps))
        sides["sizes with"] = partial(sample, changed, inputs, its_steps)
        if name != "layerwise casting":  # a pipeline does not hold the cut weights then
            sides["sizes with"] = held(sides["sizes with"])
    with counting(small) as calls:
        sides["size with"]()
    ran = f" (the last attention ran in {len(calls)} of {steps} steps)" if "_cache_config" in vars(small) else ""
    times = comparison.time_in_turn(sides)
    for kind, what in (("sizes", "supernet"), ("size", "extracted")):
        if kind in times:
            comparison.add_times(f"{name}{ran}, {what}: with, without", times[f"{kind} with"], times[kind])


def held(step: Callable[[], None]) -> Callable[[], None]:
    """As a pipeline samples from a supernet: the weights are cut once for all steps."""

    def run() -> None:
        with cut_once():
            step()

    return run


if __name__ == "__main__":
    sys.exit(main(compare, __doc__, devices=("cpu",)))

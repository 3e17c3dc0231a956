"""The time of guidance whose unconditional half is a small size, where a forward is bound by its MACs.

The denoiser of `latency.py` with random weights, in Stable Diffusion without its encoders: a call is guidance and
steps of the denoiser, nothing else. `guidance.py` tells what such guidance does to images.

python benchmarks/guidance_time.py
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from typing import Any

from denoisers import make_denoiser, make_supernet
from diffusers import DDIMScheduler, StableDiffusionPipeline
from side_by_side import Comparison, main
from torch import randn

from ofadiff import OFAPipeline

SIZES = (0.4, 0.6, 0.8, 1.0)
STEPS = 5
IMAGES = {"cpu": (1, 2), "cuda": (1, 4)}
# Of the time ratio over the ratio of MACs. Whether the batch can be split is tried in a call that is not timed.
MAX_TIME = 1.15


def load_pipeline(comparison: Comparison, folder: str) -> OFAPipeline:
    denoiser = make_denoiser(comparison)
    without = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    StableDiffusionPipeline(unet=denoiser, scheduler=scheduler, **without).save_pretrained(folder)
    make_supernet(denoiser, SIZES).save_pretrained(f"{folder}/unet")
    pipeline = OFAPipeline.from_pretrained(folder, **without).to(comparison.device, comparison.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare(comparison: Comparison) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = load_pipeline(comparison, folder)
    steps = 2 if comparison.quick else STEPS
    width = pipeline.unet.config.cross_attention_dim
    prompt, nothing = randn(2, 1, 77, width, device=comparison.device, dtype=comparison.dtype)
    call: dict[str, Any] = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": nothing,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    for images in (1,) if comparison.quick else IMAGES[comparison.device.type]:
        compare_call(comparison, pipeline, {**call, "num_images_per_prompt": images})


def compare_call(comparison: Comparison, pipeline: OFAPipeline, call: dict[str, Any]) -> None:
    sides = {"both": partial(pipeline, **call)}
    sides |= {f"{size:g}": partial(pipeline, **call, guidance_size=size) for size in SIZES[:-1]}
    times = comparison.time_in_turn(sides)
    images, steps = call["num_images_per_prompt"], call["num_inference_steps"]
    for subnet in list(pipeline.subnets)[:-1]:
        macs = (1 + subnet.macs / pipeline.subnets.full_macs) / 2
        name = f"{subnet.size:g}"
        what = f"images {images}, {steps} steps, unconditional half at {name}, {macs:.3f} of the MACs"
        comparison.add_times(f"{what}: it, both halves at full size", times[name], times["both"], MAX_TIME * macs)


if __name__ == "__main__":
    sys.exit(main(compare, __doc__))

"""The frozen half of a latent text-to-image pipeline: images to latents, captions to embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from ofadiff.training.losses import Batch


def _stable_diffusion(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    hidden_states, _ = pipeline.encode_prompt(
        list(captions), pipeline.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden_states}


def _stable_diffusion_xl(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    hidden_states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), device=pipeline.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.config.force_zeros_for_empty_prompt:  # sampling puts zeros in place of an empty negative prompt
        given = torch.tensor([bool(caption) for caption in captions], device=pooled.device)
        hidden_states, pooled = hidden_states * given[:, None, None], pooled * given[:, None]
    return {"encoder_hidden_states": hidden_states, "text_embeds": pooled}


# Another kind of pipeline is one function and one line: (pipeline, captions) -> the text's arguments of its denoiser.
CAPTION_ENCODERS: dict[type[DiffusionPipeline], Callable[[Any, Sequence[str]], dict[str, Tensor]]] = {
    StableDiffusionPipeline: _stable_diffusion,
    StableDiffusionXLPipeline: _stable_diffusion_xl,
}


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: Tensor) -> dict[str, Tensor]:
    """The distribution of the latents of images, `(N, 3, H, W)` in [-1, 1], as the denoiser takes them.

    Returns:
        `latent_mean` and `latent_std`, `(N, C, H/8, W/8)`, float32.
    """
    distribution = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return {"latent_mean": distribution.mean.float() * scale, "latent_std": distribution.std.float() * scale}


class TextToImageEncoder:
    """The VAE and the text encoders of a pipeline, frozen: what `prepare_latents` takes as its `encode`.

    Args:
        pipeline: Of a class in `CAPTION_ENCODERS`; its own `encode_prompt` encodes captions, as it does in sampling.

    Example:
        >>> encode = TextToImageEncoder(pipeline)
        >>> encode.to("cuda")
        >>> inputs = prepare_latents(batch, noise_scheduler, encode)
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        for module in self.modules:
            module.requires_grad_(False).eval()
        # It warns about every caption that is cut at the text encoder's length: a line per step.
        logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)

    @property
    def modules(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        names = ("vae", "text_encoder", "text_encoder_2")
        return [self.pipeline.components[name] for name in names if name in self.pipeline.components]

    def to(self, device: torch.device | str) -> None:
        """Moves the VAE and the text encoders."""
        for module in self.modules:
            module.to(device)

    def __call__(self, batch: Batch) -> Batch:
        """Encodes `pixel_values`, `(N, 3, H, W)`, and `captions`, N strings; everything else stays."""
        rest = {name: value for name, value in batch.items() if name not in ("pixel_values", "captions")}
        return {**rest, **self.encode_images(batch["pixel_values"]), **self.encode_captions(batch["captions"])}

    def encode_images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """`latent_mean` and `latent_std`, see the function of this name."""
        return encode_images(self.pipeline.vae, pixel_values)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states`, `(N, tokens, channels)`, and for SDXL `text_embeds`, `(N, channels)`."""
        return CAPTION_ENCODERS[type(self.pipeline)](self.pipeline, captions)

"""The frozen half of a latent text-to-image pipeline: images to latents, captions to embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from ofadiff.denoisers.families import FAMILIES
from ofadiff.noise.draws import Batch


def _kl(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixel_values).latent_dist
    return distribution.mean.float() - (vae.config.shift_factor or 0.0), distribution.std.float()


def _dc(vae: AutoencoderDC, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    latents = vae.encode(pixel_values).latent.float()
    return latents, torch.zeros_like(latents)


# Another kind of autoencoder is one function and one line: (vae, pixels) -> mean and deviation of the unscaled latents.
AUTOENCODERS: dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    AutoencoderKL: _kl,
    AutoencoderDC: _dc,
}


def spatial_compression(vae: nn.Module) -> int:
    """Pixels to a latent, along a side."""
    blocks = "encoder_block_out_channels" if isinstance(vae, AutoencoderDC) else "block_out_channels"
    return 2 ** (len(vae.config[blocks]) - 1)


@torch.no_grad()
def encode_images(vae: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """The distribution of the latents of images, `(N, 3, H, W)` in [-1, 1], as the denoiser takes them.

    Args:
        vae: Of a class in `AUTOENCODERS`.
        pixel_values: The images.

    Returns:
        `latent_mean` and `latent_std`, `(N, C, H/8, W/8)` (or what the autoencoder reduces sides to), float32.
    """
    mean, std = AUTOENCODERS[type(vae)](vae, pixel_values.to(vae.device, vae.dtype))
    scale = vae.config.scaling_factor
    return {"latent_mean": mean * scale, "latent_std": std * scale}


class TextToImageEncoder:
    """The VAE and the text encoders of a pipeline, frozen: what `prepare_latents` takes as its `encode`.

    Args:
        pipeline: Of a class in `FAMILIES`; its own `encode_prompt` encodes captions, as it does in sampling.

    Example:
        >>> encode = TextToImageEncoder(pipeline)
        >>> encode.to("cuda")
        >>> inputs = prepare_latents(batch, family, unet.config, forward_process, encode)
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
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith(("vae", "text_encoder")) and part is not None]

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
        """The text of N captions, see `Family.encode_captions`."""
        return FAMILIES[type(self.pipeline).__name__].encode_captions(self.pipeline, captions)

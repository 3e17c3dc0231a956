"""The frozen half of a pipeline: images to latents, captions to embeddings, labels as they are or left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from ofadiff.denoisers.dit import drop_labels
from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.table import DENOISERS, kind_of_pipeline
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
        vae: VAE of a class in `AUTOENCODERS`.
        pixel_values: The images.

    Returns:
        `latent_mean` and `latent_std`, `(N, C, H/8, W/8)` (or what the autoencoder reduces sides to), float32.
    """
    mean, std = AUTOENCODERS[type(vae)](vae, pixel_values.to(vae.device, vae.dtype))
    scale = vae.config.scaling_factor
    return {"latent_mean": mean * scale, "latent_std": std * scale}


class Encoder:
    """The VAE and the text encoders of a pipeline, frozen: what `prepare_batch` takes as its `encode`.

    Args:
        pipeline: Its own `encode_prompt` encodes captions, as it does in sampling. Without a VAE pixels stay pixels.
        kind: How it calls its denoiser; by default that in `DENOISERS`.
        null_class: The label of no class, if the denoiser has one.
        class_dropout_prob: Share of the samples that get it, in [0, 1].

    Raises:
        ValueError: If the pipeline is of no known kind, or the share is not one.

    Example:
        >>> encode = Encoder(pipeline)
        >>> encode.to("cuda")
        >>> inputs = prepare_batch(batch, kind, unet.config, forward_process, encode)
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        kind: DenoiserKind | None = None,
        null_class: int | None = None,
        class_dropout_prob: float = 0.0,
    ) -> None:
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob is {class_dropout_prob}; it must lie in [0, 1]")
        found = (
            kind_of_pipeline({**pipeline.config, "_class_name": type(pipeline).__name__}, DENOISERS.values())
            if kind is None
            else None
        )
        if kind is None and found is None:
            raise ValueError(f"this {type(pipeline).__name__} is of no kind in ofadiff.denoisers.DENOISERS")
        self.pipeline = pipeline
        self.kind = kind if found is None else found[0]
        self.null_class = null_class
        self.class_dropout_prob = class_dropout_prob
        for module in self.modules:
            module.requires_grad_(False).eval()
        # It warns about every caption that is cut at the text encoder's length: a line per step.
        logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)

    @property
    def modules(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith(("vae", "text_encoder")) and part is not None]

    @property
    def vae(self) -> nn.Module | None:
        """None for models of pixels."""
        return self.pipeline.components.get("vae")

    def to(self, device: torch.device | str) -> None:
        """Moves the VAE and the text encoders."""
        for module in self.modules:
            module.to(device)

    def __call__(self, batch: Batch) -> Batch:
        """Encodes a batch.

        Args:
            batch: `pixel_values`, `(N, C, H, W)`; `captions`, N strings, or `class_labels`, `(N,)`; and `seeds`,
                `(N,)`. Everything else stays.
        """
        encoded = {name: value for name, value in batch.items() if name not in ("pixel_values", "captions")}
        if self.vae is None:
            encoded["pixel_values"] = batch["pixel_values"]
        else:
            encoded |= self.encode_images(batch["pixel_values"])
        if "captions" in batch:
            encoded |= self.encode_captions(batch["captions"])
        if self.null_class is not None:
            labels, seeds = batch["class_labels"], batch["seeds"]
            encoded["class_labels"] = drop_labels(labels, seeds, self.null_class, self.class_dropout_prob)
        return encoded

    def encode_images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """`latent_mean` and `latent_std`, see the function of this name."""
        assert self.vae is not None
        return encode_images(self.vae, pixel_values)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text of N captions, see `DenoiserKind.encode_captions`."""
        assert self.kind is not None and self.kind.encode_captions is not None
        return self.kind.encode_captions(self.pipeline, captions)

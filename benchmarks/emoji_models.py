"""The models of the emoji benchmark, small ones of Stable Diffusion's own classes, trained from scratch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from from_scratch import train_from_scratch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from ofadiff.denoisers.encoder import Encoder
from ofadiff.denoisers.prepare import prepare_batch
from ofadiff.denoisers.unet_2d_condition import STABLE_DIFFUSION
from ofadiff.noise.diffusion import diffuse
from ofadiff.training.losses import denoising_loss

TOKENS = 16  # the longest names have more and are cut
WORDS = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Size and schedule of one model: channels (or hidden size) per level, steps, items per step, learning rate."""

    channels: tuple[int, ...]
    steps: int
    batch_size: int
    learning_rate: float


def make_tokenizer(folder: Path, captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs learned from the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # CLIP splits hyphens off words, and knows every letter at the end of a word too.
    texts = [caption.replace("-", " - ") for caption in captions]
    letters = sorted({letter for text in texts for letter in text.replace(" ", "")})
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix=WORDS, initial_alphabet=letters, special_tokens=[START, END, *letters]
    )
    tokenizer.train_from_iterator([*texts, *letters], trainer)
    vocabulary, merges = tokenizer.model.save(str(folder))
    return CLIPTokenizer(vocabulary, merges, model_max_length=TOKENS)


def train_clip(
    images: Tensor, captions: Sequence[str], tokenizer: CLIPTokenizer, recipe: Recipe, device: str
) -> CLIPModel:
    """A CLIP of the images, `(N, 3, H, W)` in [-1, 1], and their captions; contrastive, on shifted, scaled ones."""
    (width,), resolution = recipe.channels, images.shape[-1]
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=64,
        **tower,
    )
    vision = CLIPVisionConfig(image_size=resolution, patch_size=resolution // 8, projection_dim=64, **tower)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)).to(
        device
    )
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").to(device)
    images = images.to(device)
    augment = v2.Compose(
        [
            v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.8, 1.1), fill=1.0),
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], p=0.5),
        ]
    )

    def contrastive_loss(batch: Sequence[int]) -> Tensor:
        chosen = torch.tensor(batch, device=device)
        views = torch.cat([augment(part) for part in images[chosen].chunk(8)])
        views = views + 0.05 * torch.randn_like(views)
        found = model(
            input_ids=tokens.input_ids[chosen], attention_mask=tokens.attention_mask[chosen], pixel_values=views
        )
        target = torch.arange(len(batch), device=device)
        return (F.cross_entropy(found.logits_per_image, target) + F.cross_entropy(found.logits_per_text, target)) / 2

    fit(model, contrastive_loss, len(images), recipe, "CLIP")
    return model


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """What `ofadiff.evaluate(clip_model=...)` loads."""
    resolution = model.config.vision_config.image_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": resolution},
        crop_size={"height": resolution, "width": resolution},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


class ImageTower(nn.Module):
    """CLIP's image embeddings as features of FID and KID, `(N, 64)`, before they are normalised."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images `(N, 3, H, W)` to features."""
        pixels = self.clip.vision_model(pixel_values=images.float() / 127.5 - 1).pooler_output
        return self.clip.visual_projection(pixels)


def train_vae(images: Tensor, recipe: Recipe, device: str) -> AutoencoderKL:
    """An autoencoder of images, `(N, 3, H, W)` in [-1, 1], to latents of a quarter of the side and variance 1."""
    levels = len(recipe.channels)
    vae = AutoencoderKL(
        block_out_channels=recipe.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=images.shape[-1],
    ).to(device)
    images = images.to(device)

    def loss(batch: Sequence[int]) -> Tensor:
        pixels = images[torch.tensor(batch, device=device)]
        latents = vae.encode(pixels).latent_dist
        decoded = vae.decode(latents.sample()).sample
        return (
            F.l1_loss(decoded, pixels)
            + F.mse_loss(decoded, pixels)
            + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        )

    fit(vae, loss, len(images), recipe, "VAE")
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def make_pipeline(
    vae: AutoencoderKL, clip_folder: Path, tokenizer: CLIPTokenizer, recipe: Recipe, resolution: int
) -> StableDiffusionPipeline:
    """Stable Diffusion, with CLIP's text tower and a UNet that is not trained yet."""
    text_encoder = CLIPTextModel.from_pretrained(clip_folder)
    levels = len(recipe.channels)
    unet = UNet2DConditionModel(
        sample_size=resolution // 2 ** (len(vae.config.block_out_channels) - 1),
        block_out_channels=recipe.channels,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=text_encoder.config.hidden_size,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    pipeline: StableDiffusionPipeline, images: Tensor, captions: Sequence[str], recipe: Recipe, device: str
) -> None:
    """Trains the UNet of a pipeline, in place, on images, `(N, 3, H, W)` in [-1, 1]; a tenth of the captions empty."""
    pipeline.to(device)
    encode = Encoder(pipeline)
    parts = [encode.encode_images(part) for part in images.split(128)]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    text = torch.cat(
        [encode.encode_captions(captions[i : i + 128])["encoder_hidden_states"] for i in range(0, len(captions), 128)]
    )
    empty = encode.encode_captions([""])["encoder_hidden_states"]
    prepare = functools.partial(
        prepare_batch,
        kind=STABLE_DIFFUSION,
        config=pipeline.unet.config,
        forward_process=functools.partial(
            diffuse, noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config)
        ),
    )

    def loss(batch: Sequence[int]) -> Tensor:
        chosen = torch.tensor(batch, device=device)
        unconditional = torch.rand(len(batch), 1, 1, device=device) < 0.1
        samples = {name: values[chosen] for name, values in encoded.items()}
        samples["encoder_hidden_states"] = torch.where(unconditional, empty, text[chosen])
        samples["seeds"] = torch.randint(2**62, (len(batch),))
        return denoising_loss(pipeline.unet, samples, prepare).mean()

    fit(pipeline.unet, loss, len(images), recipe, "UNet")


def fit(model: nn.Module, loss_fn, items: int, recipe: Recipe, name: str) -> None:
    """`train_from_scratch` with a recipe's values."""
    train_from_scratch(
        model,
        loss_fn,
        items,
        steps=recipe.steps,
        batch_size=min(recipe.batch_size, items),
        learning_rate=recipe.learning_rate,
        name=name,
    )

"""Tiny pipelines of Stable Diffusion's own classes, and captioned noise to train them on."""

import json

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
TOKENS = 12
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def make_tokenizer(folder):
    """CLIP's tokenizer over single letters."""
    folder.mkdir()
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def make_text_encoder(tokenizer, model_class=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config).eval()


def make_vae(**changes):
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def make_unet(**changes):
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        **BLOCKS,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def make_scheduler(prediction_type="epsilon"):
    return DDIMScheduler(num_train_timesteps=50, prediction_type=prediction_type, steps_offset=1, clip_sample=False)


def save_stable_diffusion(folder, prediction_type="epsilon", **changes):
    """Stable Diffusion 1.x, or with `v_prediction` 2.x; images of 16 pixels."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokens"))
    StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(**changes),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_stable_diffusion_xl(folder):
    """SDXL; images of 16 pixels."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokens"))
    unet = make_unet(
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    StableDiffusionXLPipeline(
        vae=make_vae(force_upcast=True),
        text_encoder=make_text_encoder(tokenizer),
        text_encoder_2=make_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
    ).save_pretrained(folder)


def save_captioned_images(folder, count=12):
    """Images of noise in several shapes, with a metadata.jsonl."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    lines = []
    for index in range(count):
        name = f"{index:02}.png"
        Image.fromarray(noise.integers(0, 255, (20, 16 + index % 5, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"noise {LETTERS[index]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))

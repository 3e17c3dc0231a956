"""Example inputs: what one forward of a denoiser takes, to count and time it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TEXT_TOKENS = 77
# Of transformers whose text encoder is a T5 or a language model.
LONG_TEXT_TOKENS = 256
# Where a transformer's config names no size: latents of 1024 pixels, and of a video of 5 seconds, 480 pixels high.
LATENT_SIZE = 128
LATENT_VIDEO = (21, 60, 104)


def example_inputs(model: nn.Module, batch_size: int = 1) -> dict[str, Any]:
    """Keyword arguments for one forward at the sample size of the model's config, on its device, in its dtype.

    Transformers whose config names no size get the latents of a 1024-pixel image, or of a 5-second video.

    Raises:
        ValueError: If the model's class is none that inputs are known for, or its config has no sample size.
    """
    for known in type(model).__mro__:
        if known.__name__ in INPUTS:
            return INPUTS[known.__name__](model, _Zeros(model, batch_size))
    accepted = ", ".join(INPUTS)
    raise ValueError(f"no example inputs are known for {type(model).__name__}, only for {accepted}; pass inputs")


class _Zeros:
    """Zeros for every sample of a batch, on a model's device, in its dtype."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.batch_size, self.device, self.dtype = batch_size, model.device, model.dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(self.batch_size, *shape, device=self.device, dtype=dtype or self.dtype)

    def whole(self, *shape: int) -> torch.Tensor:
        return self(*shape, dtype=torch.long)


def _unet_2d(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    inputs = {"sample": zeros(model.config.in_channels, *_sample_size(model)), "timestep": zeros.whole()}
    if model.config.num_class_embeds is not None:
        inputs["class_labels"] = zeros.whole()
    return inputs


def _unet_2d_condition(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    text_width = config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(text_width, (tuple, list)):
        text_width = text_width[0]
    inputs: dict[str, Any] = {
        **_unet_2d(model, zeros),
        "encoder_hidden_states": zeros(TEXT_TOKENS, text_width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = zeros(config.time_cond_proj_dim)
    return inputs


def _sample_size(model: nn.Module) -> tuple[int, int]:
    size = model.config.sample_size
    if size is None:
        raise ValueError(f"the config of this {type(model).__name__} has no sample_size; pass inputs")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image(model: nn.Module, zeros: _Zeros, text_width: int, text_tokens: int = LONG_TEXT_TOKENS) -> dict[str, Any]:
    """What every text-to-image transformer over latents takes."""
    return {
        "hidden_states": zeros(model.config.in_channels, *_sample_size(model)),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(text_tokens, text_width),
    }


def _dit(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    return {
        "hidden_states": zeros(model.config.in_channels, *_sample_size(model)),
        "timestep": zeros.whole(),
        "class_labels": zeros.whole(),
    }


def _pixart(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    inputs = _image(model, zeros, config.caption_channels or config.cross_attention_dim)
    if model.use_additional_conditions:
        inputs["added_cond_kwargs"] = {"resolution": zeros(2), "aspect_ratio": zeros(1)}
    else:
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def _sana(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    inputs = _image(model, zeros, model.config.caption_channels)
    if model.config.guidance_embeds:
        inputs["guidance"] = zeros()
    return inputs


def _sd3(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    inputs = _image(model, zeros, model.config.joint_attention_dim, TEXT_TOKENS + LONG_TEXT_TOKENS)
    return {**inputs, "pooled_projections": zeros(model.config.pooled_projection_dim)}


def _auraflow(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    return _image(model, zeros, model.config.joint_attention_dim)


def _lumina2(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    inputs = _image(model, zeros, model.config.cap_feat_dim)
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2], device=zeros.device, dtype=torch.bool)
    return {**inputs, "encoder_attention_mask": mask}


def _hunyuan_dit(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    height, width = _sample_size(model)
    inputs = {
        **_image(model, zeros, config.cross_attention_dim, config.text_len),
        "text_embedding_mask": zeros(config.text_len),
        "encoder_hidden_states_t5": zeros(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": zeros(config.text_len_t5),
    }
    tokens = height * width // config.patch_size**2
    angles = torch.zeros(tokens, head_dim, device=zeros.device, dtype=zeros.dtype)
    inputs["image_rotary_emb"] = (angles, angles)
    if config.use_style_cond_and_image_meta_size:
        inputs["image_meta_size"] = zeros(6)
        inputs["style"] = zeros.whole()
    return inputs


def _packed(model: nn.Module, zeros: _Zeros, axes: int) -> dict[str, Any]:
    """A sequence of image tokens, two latents wide and high each, and one of text, with their positions."""
    tokens = (LATENT_SIZE // 2) ** 2
    positions = torch.zeros(tokens + LONG_TEXT_TOKENS, axes, device=zeros.device, dtype=zeros.dtype)
    inputs = {
        "hidden_states": zeros(tokens, model.config.in_channels),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.joint_attention_dim),
        "timestep": zeros(),
        "img_ids": positions[:tokens],
        "txt_ids": positions[tokens:],
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = zeros()
    return inputs


def _flux(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    return {**_packed(model, zeros, 3), "pooled_projections": zeros(model.config.pooled_projection_dim)}


def _flux2(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    return _packed(model, zeros, 4)


def _qwen_image(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    side = LATENT_SIZE // 2
    inputs = {
        "hidden_states": zeros(side * side, model.config.in_channels),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.joint_attention_dim),
        "timestep": zeros(),
        "img_shapes": [[(1, side, side)]] * zeros.batch_size,
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = zeros()
    return inputs


def _wan(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    inputs = {
        "hidden_states": zeros(config.in_channels, *LATENT_VIDEO),
        "timestep": zeros.whole(),
        "encoder_hidden_states": zeros(2 * LONG_TEXT_TOKENS, config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = zeros(LONG_TEXT_TOKENS + 1, config.image_dim)
    return inputs


def _ltx(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    frames, height, width = LATENT_VIDEO[0], LATENT_VIDEO[1] // 4, LATENT_VIDEO[2] // 4
    return {
        "hidden_states": zeros(frames * height * width, model.config.in_channels),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(LONG_TEXT_TOKENS, model.config.caption_channels),
        "encoder_attention_mask": zeros(LONG_TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _cogvideox(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    inputs = {
        "hidden_states": zeros(frames, config.in_channels, config.sample_height, config.sample_width),
        "timestep": zeros.whole(),
        "encoder_hidden_states": zeros(config.max_text_seq_length, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames * config.sample_height * config.sample_width // config.patch_size**2
        angles = torch.zeros(tokens, config.attention_head_dim, device=zeros.device, dtype=zeros.dtype)
        inputs["image_rotary_emb"] = (angles, angles)
    return inputs


def _uvit_2d(model: nn.Module, zeros: _Zeros) -> dict[str, Any]:
    config = model.config
    return {
        "input_ids": zeros.whole(*_sample_size(model)),
        "encoder_hidden_states": zeros(TEXT_TOKENS, config.encoder_hidden_size),
        "pooled_text_emb": zeros(config.cond_embed_dim),
        "micro_conds": zeros(5),
    }


# A new kind of denoiser is one function and one line here.
INPUTS: dict[str, Callable[[nn.Module, _Zeros], dict[str, Any]]] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "UVit2DModel": _uvit_2d,
    "AuraFlowTransformer2DModel": _auraflow,
    "CogVideoXTransformer3DModel": _cogvideox,
    "DiTTransformer2DModel": _dit,
    "Flux2Transformer2DModel": _flux2,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "LTXVideoTransformer3DModel": _ltx,
    "Lumina2Transformer2DModel": _lumina2,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
}

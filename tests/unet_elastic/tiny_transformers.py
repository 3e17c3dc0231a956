"""Tiny denoisers of diffusers: for every class a configuration, and inputs for one forward.

Four heads of eight channels unless a class wants more. In the inputs a tuple is the shape of one sample's noise, and
whatever must not be noise is made by a function of the batch size.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from versions import since


def ints(high: int, *shape: int) -> Callable[[int], torch.Tensor]:
    """Integers below `high`, the same in every sample."""
    return lambda n: torch.arange(torch.Size(shape).numel()).remainder(high).view(shape).expand(n, *shape).clone()


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], torch.Tensor]:
    return lambda n: torch.ones(n, *shape, dtype=dtype)


def fixed(value: Any) -> Callable[[int], Any]:
    return lambda n: value


def steps(n: int) -> torch.Tensor:
    return torch.linspace(100, 900, n)


def whole_steps(n: int) -> torch.Tensor:
    return torch.linspace(100, 900, n).long()


def unit_steps(n: int) -> torch.Tensor:
    return torch.linspace(0.1, 0.9, n)


HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
IMAGE = (4, 8, 8)
VIDEO = (4, 2, 8, 8)
TEXT = (6, 16)

TRANSFORMER_INPUTS = {"hidden_states": IMAGE, "timestep": steps, "encoder_hidden_states": TEXT}
VIDEO_INPUTS = {**TRANSFORMER_INPUTS, "hidden_states": VIDEO}

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
    **HEADS,
}


def packed(axes: int) -> dict[str, Any]:
    """A sequence of sixteen image tokens and six text tokens with their positions."""
    return {
        "hidden_states": (16, 4),
        "encoder_hidden_states": TEXT,
        "timestep": unit_steps,
        "img_ids": fixed(torch.cartesian_prod(*[torch.arange(4.0)] * 2, *[torch.zeros(1)] * (axes - 2))),
        "txt_ids": fixed(torch.zeros(6, axes)),
    }


WAN = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2, **HEADS}

# Class: configuration, inputs.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 16,
        },
        {
            "hidden_states": (8, 4),
            "timestep": unit_steps,
            "timestep_r": unit_steps,
            "encoder_hidden_states": TEXT,
            "context_latents": (8, 8),
        },
    ),
    "AllegroTransformer3DModel": (
        {
            **HEADS,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
        },
        VIDEO_INPUTS,
    ),
    "AnyFlowTransformer3DModel": (
        WAN,
        {
            **VIDEO_INPUTS,
            "hidden_states": (2, 4, 8, 8),
            "timestep": ones(2),
            "r_timestep": ones(2),
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        {**TRANSFORMER_INPUTS, "timestep": unit_steps},
    ),
    "BriaTransformer2DModel": ({**FLUX, "pooled_projection_dim": None}, packed(3)),
    "BriaFiboTransformer2DModel": (
        {**FLUX, "text_encoder_dim": 8},
        {**packed(3), "text_encoder_layers": lambda n: [torch.randn(n, 6, 8) for _ in range(2)]},
    ),
    "ChromaTransformer2DModel": (
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        packed(3),
    ),
    "ChronoEditTransformer3DModel": (WAN, VIDEO_INPUTS),
    "CogVideoXTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
        {**VIDEO_INPUTS, "hidden_states": (2, 4, 8, 8)},
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        {**TRANSFORMER_INPUTS, "original_size": ones(2), "target_size": ones(2), "crop_coords": ones(2)},
    ),
    "CogView4Transformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        {**TRANSFORMER_INPUTS, "original_size": ones(2), "target_size": ones(2), "crop_coords": ones(2)},
    ),
    "CosmosTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            "extra_pos_embed_type": "learnable",
        },
        {**VIDEO_INPUTS, "padding_mask": lambda n: torch.zeros(1, 1, 8, 8)},
    ),
    "DiTTransformer2DModel": (
        {**HEADS, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"hidden_states": IMAGE, "timestep": whole_steps, "class_labels": ints(10)},
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 16,
            "rope_axes_dim": (2, 2, 4),
        },
        {
            "hidden_states": IMAGE,
            "timestep": whole_steps,
            "text_bth": TEXT,
            "text_lens": lambda n: torch.tensor([6] * n),
        },
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "timestep_guidance_channels": 16, "mlp_ratio": 2.0, "axes_dims_rope": (2, 2, 2, 2)},
        {**packed(4), "guidance": unit_steps},
    ),
    "Flux3Transformer2DModel": (
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "mlp_ratio": 2.0,
            "axes_dims_rope": (2, 2, 2, 2),
            **HEADS,
        },
        packed(4),
    ),
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 16, "guidance_embeds": True},
        {**packed(3), "pooled_projections": (16,), "guidance": unit_steps},
    ),
    "GlmImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 10,
        },
        {
            **TRANSFORMER_INPUTS,
            "prior_token_id": ints(10, 16),
            "prior_token_drop": ones(16, dtype=torch.bool),
            "target_size": ones(2),
            "crop_coords": ones(2),
        },
    ),
    "HeliosTransformer3DModel": ({**WAN, "rope_dim": (4, 2, 2)}, VIDEO_INPUTS),
    "HiDreamImageTransformer2DModel": (
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [16, 8],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": [0, 0],
            "force_inference_output": True,
        },
        {
            "hidden_states": IMAGE,
            "timesteps": whole_steps,
            "encoder_hidden_states_t5": TEXT,
            "encoder_hidden_states_llama3": lambda n: torch.randn(1, n, 6, 8),
            "pooled_embeds": (16,),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8,
            "text_len": 6,
            "text_len_t5": 4,
            "use_style_cond_and_image_meta_size": False,
        },
        {
            **TRANSFORMER_INPUTS,
            "text_embedding_mask": ones(6),
            "encoder_hidden_states_t5": (4, 8),
            "text_embedding_mask_t5": ones(4),
            "image_rotary_emb": lambda n: (torch.randn(16, 8), torch.randn(16, 8)),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        {**TRANSFORMER_INPUTS, "encoder_attention_mask": ones(6)},
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 2, 4),
            "guidance_embeds": False,
        },
        {**VIDEO_INPUTS, "encoder_attention_mask": ones(6), "pooled_projections": (8,)},
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 2, 4),
        },
        {
            **VIDEO_INPUTS,
            "encoder_attention_mask": ones(6),
            "encoder_hidden_states_2": (4, 8),
            "encoder_attention_mask_2": ones(4),
            "image_embeds": (3, 8),
        },
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [2, 2, 4],
        },
        VIDEO_INPUTS,
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
        },
        {
            **TRANSFORMER_INPUTS,
            "hidden_states": (2, 8, 8, 4),
            "pooled_projections": (8,),
            "visual_rope_pos": fixed((torch.arange(2), torch.arange(4), torch.arange(4))),
            "text_rope_pos": fixed(torch.arange(6)),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            **HEADS,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        {
            "hidden_states": (16, 4),
            "encoder_hidden_states": (6, 2, 16),
            "timestep": unit_steps,
            "position_ids": lambda n: torch.randint(0, 4, (22, 3)),
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
        },
        {
            **TRANSFORMER_INPUTS,
            "hidden_states": (32, 4),
            "encoder_attention_mask": ones(6),
            "num_frames": fixed(2),
            "height": fixed(4),
            "width": fixed(4),
        },
    ),
    "LatteTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 32,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 16,
            "video_length": 2,
        },
        VIDEO_INPUTS,
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 16, "latent_dim": 4},
        {
            "hidden_states": (8, 4),
            "encoder_hidden_states": TEXT,
            "encoder_attention_mask": ones(6, dtype=torch.bool),
            "timestep": unit_steps,
            "latent_cond": (8, 4),
        },
    ),
    "LongCatImageTransformer2DModel": (FLUX, packed(3)),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 16,
        },
        {**TRANSFORMER_INPUTS, "timestep": unit_steps, "encoder_attention_mask": ones(6, dtype=torch.bool)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 2,
            **HEADS,
            "ff_inner_dim": 48,
            "rotary_dim": 4,
            "fourier_embedding_dim": 16,
        },
        {"hidden_states": (4, 8), "timestep": unit_steps, "encoder_hidden_states": (8, 16)},
    ),
    "MochiTransformer3DModel": (
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": 6,
        },
        {**VIDEO_INPUTS, "encoder_attention_mask": ones(6, dtype=torch.bool)},
    ),
    "MotifVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (2, 2, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        VIDEO_INPUTS,
    ),
    "OvisImageTransformer2DModel": ({**FLUX, "out_channels": 4}, packed(3)),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 4,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        {**TRANSFORMER_INPUTS, "timestep": unit_steps},
    ),
    "PixArtTransformer2DModel": (
        {
            **HEADS,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
            "use_additional_conditions": False,
        },
        TRANSFORMER_INPUTS,
    ),
    "PriorTransformer": (
        {**HEADS, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 6},
        {
            "hidden_states": (16,),
            "timestep": whole_steps,
            "proj_embedding": (16,),
            "encoder_hidden_states": TEXT,
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        {
            "hidden_states": (16, 16),
            "encoder_hidden_states": TEXT,
            "encoder_hidden_states_mask": ones(6, dtype=torch.long),
            "timestep": unit_steps,
            "img_shapes": lambda n: [[(1, 4, 4)]] * n,
        },
    ),
    "SD3Transformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
        },
        {**TRANSFORMER_INPUTS, "pooled_projections": (8,)},
    ),
    "SanaTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        TRANSFORMER_INPUTS,
    ),
    "SanaVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        VIDEO_INPUTS,
    ),
    "SkyReelsV2Transformer3DModel": (WAN, VIDEO_INPUTS),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 2,
        },
        {
            "hidden_states": (4, 8),
            "timestep": unit_steps,
            "encoder_hidden_states": TEXT,
            "global_hidden_states": (8,),
            "local_add_cond": (5, 8),
        },
    ),
    "StableAudioDiTModel": (
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        {
            "hidden_states": (4, 8),
            "timestep": unit_steps,
            "encoder_hidden_states": TEXT,
            "global_hidden_states": (1, 8),
            "rotary_embedding": lambda n: (torch.randn(9, 4), torch.randn(9, 4)),
        },
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 16,
            "conditioning_dim": 32,
            "block_out_channels": (32, 32),
            "num_attention_heads": (4, 4),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 16,
            "clip_seq": 2,
        },
        {"sample": IMAGE, "timestep_ratio": unit_steps, "clip_text_pooled": (1, 16)},
    ),
    "UVit2DModel": (
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16,
            "vocab_size": 20,
            "codebook_size": 16,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "block_num_heads": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "sample_size": 8,
        },
        {
            "input_ids": ints(16, 8, 8),
            "encoder_hidden_states": TEXT,
            "pooled_text_emb": (16,),
            "micro_conds": ones(5),
        },
    ),
    "WanTransformer3DModel": (
        {**WAN, "image_dim": 8, "added_kv_proj_dim": 32},
        {**VIDEO_INPUTS, "encoder_hidden_states": (512, 16), "encoder_hidden_states_image": (4, 8)},
    ),
    "WanVACETransformer3DModel": (
        {**WAN, "vace_layers": [0], "vace_in_channels": 8},
        {**VIDEO_INPUTS, "control_hidden_states": (8, 2, 8, 8)},
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 16,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 16, 16],
        },
        {
            "x": lambda n: [torch.randn(4, 1, 8, 8) for _ in range(n)],
            "t": unit_steps,
            "cap_feats": lambda n: [torch.randn(6, 16) for _ in range(n)],
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            **HEADS,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (2, 1, 1),
        },
        {
            "hidden_states": (22, 4),
            "timestep": unit_steps,
            "encoder_hidden_states": (22, 16),
            "position_ids": lambda n: torch.randint(0, 4, (n, 22, 3)),
            "segment_ids": lambda n: torch.ones(n, 22, dtype=torch.long),
            "indicator": lambda n: torch.tensor([3] * 6 + [2] * 16).expand(n, 22).clone(),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [2, 2, 4],
        },
        {
            "hidden_states": (16, 4, 1, 2, 2),
            "timestep": steps,
            "encoder_hidden_states": TEXT,
            "encoder_hidden_states_mask": ones(6, dtype=torch.bool),
            "shape_list": lambda n: [[(1, 4, 4)]] * n,
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 1,
            "caption_channels": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 16,
            "use_prompt_embeddings": True,
        },
        {
            "hidden_states": (32, 4),
            "audio_hidden_states": (5, 4),
            "encoder_hidden_states": TEXT,
            "audio_encoder_hidden_states": TEXT,
            "timestep": steps,
            "num_frames": fixed(2),
            "height": fixed(4),
            "width": fixed(4),
            "audio_num_frames": fixed(5),
        },
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        {"hidden_states": VIDEO, "timestep": steps, "encoder_hidden_states": TEXT},
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        {
            "hidden_states": (2, 8, 8, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": (8,),
            "timestep": steps,
            "audio_hidden_states": (5, 4),
            "visual_rope_pos": fixed((torch.arange(2), torch.arange(4), torch.arange(4))),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 4, "targets_length": 6, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48},
        {
            "encodings_and_masks": lambda n: [(torch.randn(n, 5, 32), torch.ones(n, 5))],
            "decoder_input_tokens": (6, 4),
            "decoder_noise_time": unit_steps,
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
            "moe_enabled": False,
        },
        {
            "hidden_states": (16, 16),
            "encoder_hidden_states": TEXT,
            "timestep": unit_steps,
            "img_shapes": lambda n: [(1, 4, 4)] * n,
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "num_layers": 2,
            "vocab_size": 20,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        {
            "hidden_states": IMAGE,
            "timestep": steps,
            "input_ids": ints(20, 6),
            "input_img_latents": fixed([]),
            "input_image_sizes": fixed({}),
            "attention_mask": lambda n: torch.ones(n, 23, 23),
            "position_ids": lambda n: torch.arange(23).expand(n, 23).clone(),
        },
    ),
    "WanAnimateTransformer3DModel": (
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "added_kv_proj_dim": 32,
        },
        {
            "hidden_states": (12, 2, 8, 8),
            "timestep": steps,
            "encoder_hidden_states": (512, 16),
            "encoder_hidden_states_image": (4, 8),
            "pose_hidden_states": (4, 1, 8, 8),
            "face_pixel_values": (3, 1, 16, 16),
        },
    ),
    "AnyFlowFARTransformer3DModel": (
        {**WAN, "num_layers": 1, "chunk_partition": (1, 1), "full_chunk_limit": 2},
        {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": TEXT,
            "timestep": ones(2),
            "r_timestep": ones(2),
            "chunk_partition": fixed([1, 1]),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 2, 2),
            "causal_condition": False,
        },
        {
            "hidden_states": (16, 4),
            "encoder_hidden_states": TEXT,
            "timestep": unit_steps,
            "img_shapes": lambda n: [[(1, 4, 4)]] * n,
            "img_mask": lambda n: (torch.arange(10) >= 6).expand(n, 10).clone(),
        },
    ),
}

# What the forward of an older diffusers takes beside it.
FORMERLY: dict[str, dict[str, Any]] = {"QwenImageTransformer2DModel": {"txt_seq_lens": lambda n: [6] * n}}


# Whose attention a rule names, where an older class has another one.
ATTENTIONS = {
    "SkyReelsV2Transformer3DModel": "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2Attention",
}


def tiny(name: str, **changes: Any) -> ModelMixin:
    """The tiny model of a class in eval mode; zero-initialised weights are made random, so that every block counts."""
    torch.manual_seed(0)
    if name in ATTENTIONS:
        since(ATTENTIONS[name])
    model = since(f"diffusers.{name}")(**{**TINY[name][0], **changes}).eval()
    for parameter in model.parameters():
        if parameter.numel() and (parameter.ndim < 2 or not parameter.any()):
            torch.nn.init.normal_(parameter, mean=float(parameter.any()), std=0.2)
    return model


def tiny_inputs(name: str, batch_size: int = 2, seed: int = 0) -> dict[str, Any]:
    """Forward arguments for the tiny model of a class."""
    taken = inspect.signature(since(f"diffusers.{name}").forward).parameters
    inputs = TINY[name][1] | {key: value for key, value in FORMERLY.get(name, {}).items() if key in taken}
    torch.manual_seed(seed)
    return {
        key: torch.randn(batch_size, *value) if isinstance(value, tuple) else value(batch_size)
        for key, value in inputs.items()
    }

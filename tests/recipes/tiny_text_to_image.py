"""Tiny pipelines of the text-to-image transformers' own classes; images of 32 pixels."""

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from recipes.tiny_stable_diffusion import LETTERS, make_scheduler, make_text_encoder, make_tokenizer, make_vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TEXT_WIDTH = 32
BLOCKS = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
WIDTH = 32


def make_word_tokenizer():
    """A tokenizer over single letters as words, with T5's way of ending a text."""
    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_t5(tokenizer):
    config = T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def make_gemma(tokenizer):
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return Gemma2Model(config).eval()


def stable_diffusion_3(tokenizer, words, t5=True):
    transformer = SD3Transformer2DModel(
        **BLOCKS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * 16,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5(words) if t5 else None,
        tokenizer_3=words if t5 else None,
    )


def stable_diffusion_3_without_t5(tokenizer, words):
    return stable_diffusion_3(tokenizer, words, t5=False)


def flux(tokenizer, words):
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=4,
        attention_head_dim=8,
        axes_dims_rope=(2, 2, 4),
        in_channels=4 * 4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_text_encoder(tokenizer, CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(words),
        tokenizer_2=words,
    )


def sana(tokenizer, words):
    transformer = SanaTransformer2DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        timestep_scale=0.5,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.5,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae.eval(), text_encoder=make_gemma(words), tokenizer=words
    )


def pixart_sigma(tokenizer, words):
    transformer = PixArtTransformer2DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=make_scheduler(),
        vae=make_vae(),
        text_encoder=make_t5(words),
        tokenizer=words,
    )


PIPELINES = {
    "sd3": stable_diffusion_3,
    "sd3_without_t5": stable_diffusion_3_without_t5,
    "flux": flux,
    "sana": sana,
    "pixart_sigma": pixart_sigma,
}


def save_pipeline(name, folder):
    """One of `PIPELINES`; weights that diffusers sets to zero are made random, so that every block counts."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokens"))
    pipeline = PIPELINES[name](tokenizer, make_word_tokenizer())
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)

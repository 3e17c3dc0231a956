"""Tiny pipelines of many kinds, of diffusers' own classes, and calls of each; a call takes well under a second."""

import torch
from diffusers import (
    AnimateDiffPipeline,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderOobleck,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KandinskyV22CombinedPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    MotionAdapter,
    PriorTransformer,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusionImg2ImgPipeline,
    StableVideoDiffusionPipeline,
    UnCLIPScheduler,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from recipes.tiny_stable_diffusion import (
    LETTERS,
    TOKENS,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)
from recipes.tiny_text_to_image import BLOCKS, TEXT_WIDTH, WIDTH, make_gemma, make_t5, make_word_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GlmConfig,
    GlmModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from versions import since

CHAT = "{% for message in messages %}u {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}x{% endif %}"
DECODER = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
NORMAL = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def make_umt5(words):
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)).eval()


def make_qwen_2_5_vl(words):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={**DECODER, "num_key_value_heads": 1, "vocab_size": len(words), "rope_parameters": rope, **NO_ENDS},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_video_vae():
    """Frames four times fewer, sides eight times smaller."""
    return AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **NORMAL).eval()


def make_deep_vae():
    """Sides eight times smaller."""
    return make_vae(
        shift_factor=0.1,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def make_image_encoder(size, patch_size, width):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=width, image_size=size, patch_size=patch_size)
    return CLIPVisionModelWithProjection(config).eval()


def make_letter_tokenizer():
    """RoBERTa's tokenizer over single letters."""
    tokens = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS)
    return RobertaTokenizer({token: number for number, token in enumerate(tokens)}, [], model_max_length=16)


def qwen_image(tokenizer, words):
    sizes = {"in_channels": 4 * 4, "out_channels": 4, "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 2, 2)}
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True], **NORMAL
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(**BLOCKS, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=make_qwen_2_5_vl(words),
        tokenizer=words,
    )


def lumina2(tokenizer, words):
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(96, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_deep_vae(),
        text_encoder=make_gemma(words),
        tokenizer=words,
    )


def chroma(tokenizer, words):
    transformer = ChromaTransformer2DModel(
        **{**BLOCKS, "num_layers": 1},
        num_single_layers=2,
        in_channels=4 * 4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_t5(words),
        tokenizer=words,
    )


def cogview4(tokenizer, words):
    sizes = {**DECODER, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(words), "pad_token_id": 0}
    transformer = CogView4Transformer2DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
        vae=make_vae(),
        text_encoder=GlmModel(GlmConfig(**sizes)).eval(),
        tokenizer=words,
    )


def z_image(tokenizer, words):
    words.chat_template = CHAT
    sizes = {**DECODER, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(words)}
    transformer = since("diffusers.ZImageTransformer2DModel")(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # diffusers leaves them uninitialized
        torch.nn.init.normal_(token)
    return since("diffusers.ZImagePipeline")(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.1),
        text_encoder=since("transformers.Qwen3Model")(since("transformers.Qwen3Config")(**sizes)).eval(),
        tokenizer=words,
    )


def hunyuan_dit(tokenizer, words):
    transformer = HunyuanDiT2DModel(
        **{**BLOCKS, "num_layers": 4},  # the last one takes the first one's output
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=16,
    )
    return HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction", clip_sample=False),
        vae=make_deep_vae(),
        text_encoder=BertModel(BertConfig(vocab_size=len(words), **DECODER)).eval(),
        tokenizer=words,
        text_encoder_2=make_t5(words),
        tokenizer_2=words,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_wan_transformer():
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH, "freq_dim": 16, "ffn_dim": 48}
    return WanTransformer3DModel(**BLOCKS, **sizes, rope_max_seq_len=32)


def wan(tokenizer, words, **changes):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        transformer=make_wan_transformer(),
        scheduler=scheduler,
        vae=make_video_vae(),
        text_encoder=make_umt5(words),
        tokenizer=words,
        **changes,
    )


def wan_2_2(tokenizer, words):
    return wan(tokenizer, words, transformer_2=make_wan_transformer(), boundary_ratio=0.875)


def ltx(tokenizer, words):
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    sizes = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "caption_channels": TEXT_WIDTH}
    return LTXPipeline(
        transformer=LTXVideoTransformer3DModel(**BLOCKS, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=make_t5(words),
        tokenizer=words,
    )


def cogvideox(tokenizer, words):
    transformer = CogVideoXTransformer3DModel(
        **{**BLOCKS, "attention_head_dim": 16},
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2)
    return CogVideoXPipeline(
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
        vae=vae.eval(),
        text_encoder=make_t5(words),
        tokenizer=words,
    )


def animatediff(tokenizer, words):
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    return AnimateDiffPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(attention_head_dim=4),
        motion_adapter=adapter,
        scheduler=make_scheduler(),
    )


def stable_audio(tokenizer, words):
    words.model_max_length = 16
    transformer = StableAudioDiTModel(
        **BLOCKS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        global_states_input_dim=2 * 16,
        time_proj_dim=16,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )
    return StableAudioPipeline(
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
        vae=vae.eval(),
        text_encoder=make_t5(words),
        projection_model=StableAudioProjectionModel(TEXT_WIDTH, conditioning_dim=16, min_value=0, max_value=4).eval(),
        tokenizer=words,
    )


def audioldm2(tokenizer, words):
    text = {**DECODER, "pad_token_id": 0, "projection_dim": 16, "max_position_embeddings": 24}
    audio = {"hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 2], "projection_dim": 16}
    letters = make_letter_tokenizer()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{letter}", -1.0) for letter in LETTERS)]
    pieces = T5Tokenizer(pieces, extra_ids=0, model_max_length=16)
    clap = ClapConfig(
        text_config={**text, "vocab_size": len(letters)},
        audio_config={**audio, "num_hidden_layers": 2, "patch_embeds_hidden_size": 16},
        projection_dim=16,
    )
    language_model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=8, n_positions=64, **NO_ENDS)
    )
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        sample_size=8,
        cross_attention_dim=([None, 16, TEXT_WIDTH],) * 2,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
        initializer_range=0.3,
    )
    return AudioLDM2Pipeline(
        vae=make_vae(in_channels=1, out_channels=1),
        text_encoder=ClapModel(clap).eval(),
        text_encoder_2=make_t5(pieces),
        projection_model=AudioLDM2ProjectionModel(16, TEXT_WIDTH, 16).eval(),
        language_model=language_model.eval(),
        tokenizer=letters,
        tokenizer_2=pieces,
        feature_extractor=ClapFeatureExtractor(),
        unet=unet,
        scheduler=make_scheduler(),
        vocoder=SpeechT5HifiGan(vocoder).eval(),
    )


def kandinsky_2_2(tokenizer, words):
    unet = make_unet(
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_type="spatial",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    prior = PriorTransformer(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_embeddings=TOKENS
    )
    torch.nn.init.ones_(prior.clip_std)
    return KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=make_scheduler(),
        movq=movq.eval(),
        prior_prior=prior.eval(),
        prior_image_encoder=make_image_encoder(32, 16, width=16),
        prior_text_encoder=make_text_encoder(tokenizer, CLIPTextModelWithProjection),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(prediction_type="sample", num_train_timesteps=50, clip_sample_range=5.0),
        prior_image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )


def latte(tokenizer, words):
    transformer = LatteTransformer3DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        video_length=4,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return LattePipeline(
        transformer=transformer,
        scheduler=make_scheduler(),
        vae=make_vae(),
        text_encoder=make_t5(words),
        tokenizer=words,
    )


def auraflow(tokenizer, words):
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64,
    )
    transformer.time_step_proj.linear_2.weight.data.mul_(8)  # gates wide enough for the text to count
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=make_vae(),
        text_encoder=make_umt5(words),
        tokenizer=words,
    )


def sd_img2img(tokenizer, words):
    return StableDiffusionImg2ImgPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(attention_head_dim=4),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def svd(tokenizer, words):
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_attention_heads=4,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        num_frames=3,
    )
    vae = AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32))
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        interpolation_type="linear",
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    return StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=make_image_encoder(224, 32, width=16),  # the pipeline makes every image 224 pixels wide and high
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(size=224, crop_size=224),
    )


def make_calls(prompts=("a b c", "d", "e f g h i j"), **arguments):
    return [{"prompt": prompt, "num_inference_steps": 2, **arguments} for prompt in prompts]


IMAGE = {"height": 32, "width": 32, "guidance_scale": 3.0}
VIDEO = {**IMAGE, "num_frames": 5}
PIPELINES = {
    "qwen_image": qwen_image,
    "lumina2": lumina2,
    "chroma": chroma,
    "cogview4": cogview4,
    "z_image": z_image,
    "hunyuan_dit": hunyuan_dit,
    "wan": wan,
    "wan_2_2": wan_2_2,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "animatediff": animatediff,
    "stable_audio": stable_audio,
    "audioldm2": audioldm2,
    "kandinsky_2_2": kandinsky_2_2,
    "latte": latte,
    "auraflow": auraflow,
    "sd_img2img": sd_img2img,
    "svd": svd,
}
CALLS = {
    "qwen_image": make_calls(height=32, width=32, negative_prompt="n", true_cfg_scale=3.0),
    "lumina2": make_calls(**IMAGE, max_sequence_length=48),
    "chroma": make_calls(**IMAGE, max_sequence_length=16),
    "cogview4": make_calls(("a b c", "d " * 18, "e f"), **IMAGE),
    "z_image": make_calls(**IMAGE, max_sequence_length=16),
    "hunyuan_dit": make_calls(height=64, width=48, guidance_scale=3.0, use_resolution_binning=False),
    "wan": make_calls(**VIDEO, max_sequence_length=16),
    "wan_2_2": make_calls(**VIDEO, max_sequence_length=16),
    "ltx": make_calls(height=32, width=32, num_frames=9, guidance_scale=3.0, max_sequence_length=16),
    "cogvideox": make_calls(**IMAGE, num_frames=9, max_sequence_length=16),
    "animatediff": make_calls(height=16, width=16, num_frames=4, guidance_scale=3.0),
    "stable_audio": [{**call, "audio_end_in_s": end} for call, end in zip(make_calls(), (1.0, 2.0, 4.0), strict=True)],
    "audioldm2": make_calls(audio_length_in_s=0.004, guidance_scale=3.0, max_new_tokens=4),
    "kandinsky_2_2": make_calls(**IMAGE, prior_num_inference_steps=2, prior_guidance_scale=2.0),
    "latte": make_calls(height=16, width=16, video_length=4, guidance_scale=3.0, clean_caption=False),
    "auraflow": make_calls(**IMAGE, max_sequence_length=16),
    "sd_img2img": make_calls(image="image.png", strength=0.8, num_inference_steps=3, guidance_scale=3.0),
    "svd": [
        {"image": "image.png", "height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2, **changes}
        for changes in ({}, {"motion_bucket_id": 20}, {"fps": 3, "num_frames": 2})
    ],
}
UNETS = ("animatediff", "audioldm2", "kandinsky_2_2", "sd_img2img", "svd")
COMPONENT = {kind: "unet" if kind in UNETS else "transformer" for kind in PIPELINES}


def save_pipeline(kind, folder):
    """One of `PIPELINES`; weights that diffusers sets to zero are made random, so that every block counts."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokens"))
    pipeline = PIPELINES[kind](tokenizer, make_word_tokenizer())
    denoisers = [pipeline.components[COMPONENT[kind]], pipeline.components.get("transformer_2")]
    for parameter in (parameter for denoiser in filter(None, denoisers) for parameter in denoiser.parameters()):
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)

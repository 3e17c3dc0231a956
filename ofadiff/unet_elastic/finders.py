"""The table of finders: which function describes which block."""

from __future__ import annotations

from collections.abc import Callable

from ofadiff.channels import ChannelGroup
from ofadiff.unet_elastic.attention import attention_groups
from ofadiff.unet_elastic.feed_forward import feed_forward_groups, neurons
from ofadiff.unet_elastic.heads import head_groups
from ofadiff.unet_elastic.resnet import (
    condition_norm_resnet_groups,
    kandinsky3_groups,
    resnet_groups,
    temporal_convolution_groups,
)
from ofadiff.unet_elastic.single_stream import fused_single_stream_groups, single_stream_groups
from ofadiff.unet_elastic.value_offsets import text_head_or_value_groups, value_groups

# A new kind of block is one line here, and one file where no finder fits. Classes stand under their full names, so that
# a release of diffusers that lacks one of them is no error. Exact classes only: a subclass may compute something else.
FINDERS: dict[str, Callable[..., list[ChannelGroup]]] = {
    "diffusers.models.attention_processor.Attention": attention_groups,
    "diffusers.models.transformers.transformer_cosmos.CosmosAttention": attention_groups,
    "diffusers.models.attention_processor.MochiAttention": value_groups,
    "diffusers.models.transformers.ace_step_transformer.AceStepAttention": head_groups,
    "diffusers.models.transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthAttention": head_groups,
    "diffusers.models.transformers.transformer_anyflow.AnyFlowAttention": head_groups,
    "diffusers.models.transformers.transformer_anyflow_far.AnyFlowAttention": head_groups,
    "diffusers.models.transformers.transformer_bria.BriaAttention": head_groups,
    "diffusers.models.transformers.transformer_bria_fibo.BriaFiboAttention": head_groups,
    "diffusers.models.transformers.transformer_bria_fibo2.BriaFibo2Attention": head_groups,
    "diffusers.models.transformers.transformer_chronoedit.WanAttention": head_groups,
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3PackedMoTAttention": head_groups,
    "diffusers.models.transformers.transformer_ernie_image.ErnieImageAttention": head_groups,
    "diffusers.models.transformers.transformer_flux.FluxAttention": head_groups,
    "diffusers.models.transformers.transformer_flux2.Flux2Attention": head_groups,
    "diffusers.models.transformers.transformer_flux3.Flux3Attention": head_groups,
    "diffusers.models.transformers.transformer_helios.HeliosAttention": head_groups,
    "diffusers.models.transformers.transformer_hidream_image.HiDreamAttention": head_groups,
    "diffusers.models.transformers.transformer_ideogram4.Ideogram4Attention": head_groups,
    "diffusers.models.transformers.transformer_joyimage.JoyImageAttention": head_groups,
    "diffusers.models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusAttention": head_groups,
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5Attention": head_groups,
    "diffusers.models.transformers.transformer_kandinsky6.Kandinsky6Attention": head_groups,
    "diffusers.models.transformers.transformer_kandinsky6_sr.Kandinsky6SRAttention": head_groups,
    "diffusers.models.transformers.transformer_krea2.Krea2Attention": head_groups,
    "diffusers.models.transformers.transformer_longcat_audio_dit.AudioDiTAttention": head_groups,
    "diffusers.models.transformers.transformer_longcat_image.LongCatImageAttention": head_groups,
    "diffusers.models.transformers.transformer_ltx.LTXAttention": text_head_or_value_groups,
    "diffusers.models.transformers.transformer_ltx2.LTX2Attention": text_head_or_value_groups,
    "diffusers.models.transformers.transformer_minimax_h3.MiniMaxH3Attention": head_groups,
    "diffusers.models.transformers.transformer_minimax_music3.MiniMaxMusic3Attention": head_groups,
    "diffusers.models.transformers.transformer_motif_video.MotifVideoAttention": head_groups,
    "diffusers.models.transformers.transformer_motif_video.MotifVideoCrossAttention": head_groups,
    "diffusers.models.transformers.transformer_ovis_image.OvisImageAttention": head_groups,
    "diffusers.models.transformers.transformer_prx.PRXAttention": head_groups,
    "diffusers.models.transformers.transformer_qwenimage21.QwenImage21Attention": head_groups,
    "diffusers.models.transformers.transformer_rfd4_proteina.RFD4ProteinaPairAttention": head_groups,
    "diffusers.models.transformers.transformer_sana_wm.MultiHeadCrossAttention": head_groups,
    "diffusers.models.transformers.transformer_sana_wm_refiner.SanaWMLTX2Attention": text_head_or_value_groups,
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2Attention": head_groups,
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3CrossAttention": head_groups,
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3SelfAttention": head_groups,
    "diffusers.models.transformers.transformer_wan.WanAttention": head_groups,
    "diffusers.models.transformers.transformer_wan_animate.WanAnimateFaceBlockCrossAttention": head_groups,
    "diffusers.models.transformers.transformer_wan_animate.WanAttention": head_groups,
    "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2Attention": head_groups,
    "diffusers.models.transformers.transformer_bria.BriaSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_bria_fibo.BriaFiboSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_chroma.ChromaSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock": (
        single_stream_groups
    ),
    "diffusers.models.transformers.transformer_hunyuanimage.HunyuanImageSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_longcat_image.LongCatImageSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_motif_video.MotifVideoSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_ovis_image.OvisImageSingleTransformerBlock": single_stream_groups,
    "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention": fused_single_stream_groups,
    "diffusers.models.attention.FeedForward": feed_forward_groups,
    "diffusers.models.attention.LuminaFeedForward": neurons("linear_1", "linear_3", reader="linear_2"),
    "diffusers.models.embeddings.CombinedTimestepLabelEmbeddings": neurons(
        "timestep_embedder.linear_1", reader="timestep_embedder.linear_2", kind="time_embedding"
    ),
    "diffusers.models.transformers.ace_step_transformer.AceStepMLP": neurons(
        "gate_proj", "up_proj", reader="down_proj"
    ),
    "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowFeedForward": neurons(
        "linear_1", "linear_2", reader="out_projection"
    ),
    "diffusers.models.transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthDecoderBlock": neurons(
        "gate_proj", "up_proj", reader="down_proj"
    ),
    "diffusers.models.transformers.sana_transformer.GLUMBConv": neurons(
        "conv_inverted", "conv_depth", reader="conv_point"
    ),
    "diffusers.models.transformers.t5_film_transformer.T5DenseGatedActDense": neurons("wi_0", "wi_1", reader="wo"),
    "diffusers.models.transformers.transformer_bria_fibo2.FeedForward": neurons("w1", "w3", reader="w2"),
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3VLTextMLP": neurons(
        "gate_proj", "up_proj", reader="down_proj"
    ),
    "diffusers.models.transformers.transformer_ernie_image.ErnieImageFeedForward": neurons(
        "gate_proj", "up_proj", reader="linear_fc2"
    ),
    "diffusers.models.transformers.transformer_flux2.Flux2FeedForward": neurons("linear_in", reader="linear_out"),
    "diffusers.models.transformers.transformer_flux3.Flux3FeedForward": neurons("linear_in", reader="linear_out"),
    "diffusers.models.transformers.transformer_hidream_image.HiDreamImageFeedForwardSwiGLU": neurons(
        "w1", "w3", reader="w2"
    ),
    "diffusers.models.transformers.transformer_ideogram4.Ideogram4MLP": neurons("w1", "w3", reader="w2"),
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5FeedForward": neurons(
        "in_layer", reader="out_layer"
    ),
    "diffusers.models.transformers.transformer_krea2.Krea2SwiGLU": neurons("gate", "up", reader="down"),
    "diffusers.models.transformers.transformer_longcat_audio_dit.AudioDiTFeedForward": neurons("ff.0", reader="ff.3"),
    "diffusers.models.transformers.transformer_minimax_music3.MiniMaxMusic3TransformerBlock": neurons(
        "ff_in", reader="ff_out"
    ),
    "diffusers.models.transformers.transformer_omnigen.OmniGenFeedForward": neurons("gate_up_proj", reader="down_proj"),
    "diffusers.models.transformers.transformer_prx.PRXBlock": neurons("gate_proj", "up_proj", reader="down_proj"),
    "diffusers.models.transformers.transformer_qwenimage21.QwenImage21SwiGLUFeedForward": neurons(
        "proj", "gate_layer", reader="out"
    ),
    "diffusers.models.transformers.transformer_rfd4_proteina.RFD4ProteinaPairTransition": neurons(
        "linear_1", reader="linear_2"
    ),
    "diffusers.models.transformers.transformer_rfd4_proteina.RFD4ProteinaTransition": neurons(
        "swish_linear.0", reader="linear_out"
    ),
    "diffusers.models.transformers.transformer_sana_video.GLUMBTempConv": neurons(
        "conv_inverted", "conv_depth", reader="conv_point"
    ),
    "diffusers.models.transformers.transformer_sana_wm.GLUMBConvTemp": neurons(
        "inverted_conv.conv", "depth_conv.conv", reader="point_conv.conv"
    ),
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3FeedForward": neurons(
        "proj_in", reader="proj_out"
    ),
    "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2TransformerBlock": neurons(
        "ffn.0", reader="ffn.2"
    ),
    "diffusers.models.transformers.transformer_z_image.FeedForward": neurons("w1", "w3", reader="w2"),
    "diffusers.models.unets.unet_kandinsky3.Kandinsky3AttentionBlock": neurons(
        "feed_forward.0", reader="feed_forward.2"
    ),
    "diffusers.models.unets.unet_stable_cascade.SDCascadeResBlock": neurons(
        "channelwise.0", "channelwise.2", reader="channelwise.4"
    ),
    "diffusers.models.unets.uvit_2d.ConvNextBlock": neurons(
        "channelwise_linear_1", "channelwise_norm", reader="channelwise_linear_2"
    ),
    "diffusers.models.resnet.ResnetBlock2D": resnet_groups,
    "diffusers.models.resnet.ResnetBlockCondNorm2D": condition_norm_resnet_groups,
    "diffusers.models.resnet.TemporalConvLayer": temporal_convolution_groups,
    "diffusers.models.resnet.TemporalResnetBlock": resnet_groups,
    "diffusers.models.unets.unet_dreamlite.ResnetBlock2DDreamLite": resnet_groups,
    "diffusers.models.unets.unet_kandinsky3.Kandinsky3ResNetBlock": kandinsky3_groups,
}

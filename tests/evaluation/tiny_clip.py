"""A tiny CLIP of transformers' own classes."""

import torch
from tiny_stable_diffusion import TOKENS, make_text_encoder, make_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig


def save_clip(folder):
    """CLIP of 16x16 images and single letters, with its tokenizer and image processor."""
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokens"))
    text = make_text_encoder(tokenizer).config.to_dict() | {"max_position_embeddings": TOKENS}
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():  # CLIP starts so close to zero that all images look alike
        for parameter in model.parameters():
            parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)

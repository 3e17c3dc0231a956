"""CLIP score: how well images show what their prompts say.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv 2104.08718, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from ofadiff.reading.stumbles import in_one_sentence

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class ClipScorer:
    """A CLIP model, loaded and ready, in float32.

    Args:
        name_or_path: A CLIP of transformers with its tokenizer and image processor: a folder or a hub repository.
        device: Where it runs.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If something of it cannot be loaded.
    """

    def __init__(self, name_or_path: str = DEFAULT_CLIP, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError("the CLIP score needs transformers: pip install ofadiff[eval]") from error

        cannot = f"the CLIP model {name_or_path} cannot be loaded"
        try:
            with in_one_sentence(cannot):
                self.tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
                self.image_processor = CLIPImageProcessor.from_pretrained(name_or_path)
                model, loading = CLIPModel.from_pretrained(name_or_path, output_loading_info=True, use_safetensors=True)
        except OSError as error:
            raise ValueError(f"{cannot}: {error}") from error
        if loading["missing_keys"]:
            # transformers fills them with noise, and noise has a score too.
            raise ValueError(
                f"{name_or_path} holds no CLIP model: {len(loading['missing_keys'])} weights are missing, such as "
                f"{min(loading['missing_keys'])}"
            )
        if set(self.tokenizer.get_vocab()) <= set(self.tokenizer.all_special_tokens):
            # Nor does transformers mind that there is no vocabulary.
            raise ValueError(f"the tokenizer of {name_or_path} has no vocabulary")
        self.model = model.float().eval().to(device)

    def score(
        self, images: torch.Tensor | Dataset[torch.Tensor], prompts: Sequence[str], batch_size: int = 64
    ) -> float:
        """Mean of w · max(cos(image, prompt), 0) with w = 1: the plain cosine, about 0.3 for Stable Diffusion.

        That is how papers on text-to-image models report it; Hessel et al. take w = 2.5, torchmetrics 100. Nothing is
        put before the prompts; what is longer than CLIP's context is cut off. Only scores of one CLIP model compare.

        Args:
            images: uint8, `(N, 3, H, W)`, or a data set of N `(3, H, W)`.
            prompts: N prompts, in the order of the images.
            batch_size: Images per forward.

        Raises:
            ValueError: If there are not as many prompts as images.

        Example:
            >>> ClipScorer().score(generate(pipeline, 8, arguments={"prompt": prompts}), prompts)
        """
        return self.scores(images, prompts, batch_size).double().mean().item()

    @torch.no_grad()
    def scores(
        self, images: torch.Tensor | Dataset[torch.Tensor], prompts: Sequence[str], batch_size: int = 64
    ) -> torch.Tensor:
        """The score of each image `(N,)`, on the CPU; see `score`."""
        count = len(images)  # type: ignore[arg-type]
        if len(prompts) != count:
            raise ValueError(f"there are {count} images and {len(prompts)} prompts; each image takes one")
        device = self.model.device
        cosines = [torch.empty(0)]
        for number, batch in enumerate(DataLoader(images, batch_size=batch_size)):  # type: ignore[arg-type]
            first = number * batch_size
            tokens = self.tokenizer(
                list(prompts[first : first + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            pixels = self.image_processor(list(batch), input_data_format="channels_first", return_tensors="pt")
            found = self.model(**tokens.to(device), **pixels.to(device))  # both embeddings have norm 1
            cosines.append((found.image_embeds * found.text_embeds).sum(dim=-1).cpu())
        return torch.cat(cosines).clamp(min=0)

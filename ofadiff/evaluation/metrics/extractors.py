"""Feature extractors: Inception, DINOv2 and torch-fidelity's others, or a module of one's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

# torch-fidelity's names of the InceptionV3 that published FIDs are computed with, and of the ViT-L/14 of FD-DINOv2
# (Stein et al. 2023, arXiv 2306.04675).
ALIASES = {"inception": "inception-v3-compat", "dinov2": "dinov2-vit-l-14"}
# How every extractor of torch-fidelity's brings images to its input size (299x299 pixels for Inception, 224x224 for
# DINOv2, for which Stein et al. take Pillow's bicubic).
TENSORFLOW_RESIZE = "bilinear as in TensorFlow 1, without antialiasing (torch-fidelity)"
OWN: dict[str, nn.Module] = {}


def register_extractor(name: str, module: nn.Module) -> None:
    """Makes a module a feature extractor by name, for FID and its like on images that Inception knows nothing about.

    torch-fidelity knows it by that name too. A copy is kept, frozen and in eval mode. Registering the name again
    replaces the module.

    Args:
        name: What to call it; the report states it.
        module: Maps uint8 images `(N, 3, H, W)` to features `(N, D)`.

    Raises:
        ValueError: If the name is one of torch-fidelity's own.

    Example:
        >>> register_extractor("digits", classifier)
        >>> report = evaluate(pipeline, reference=images, extractor="digits")
    """
    if name not in OWN:
        if name in ALIASES or name in _registry():
            raise ValueError(f"{name!r} is one of torch-fidelity's own extractors; choose another name")
        _torch_fidelity().register_feature_extractor(name, _own_extractor_class())
    OWN[name] = copy.deepcopy(module).eval().requires_grad_(False)


class FeatureExtractor:
    """An extractor, loaded and ready.

    Attributes:
        name: torch-fidelity's name of it.
        resize: How images come to its input size.

    Args:
        name: `"inception"`, `"dinov2"`, another name of torch-fidelity's, or one given to `register_extractor`.
        device: Where it runs; CUDA or else the CPU.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If there is no such extractor, or its weights cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        known = find_extractor(name)
        from torch_fidelity.utils import create_feature_extractor

        self.name = known
        self.device = torch.device("cuda" if torch.device(device).type == "cuda" else "cpu")
        layer = _registry()[known].get_default_feature_layer_for_metric("fid")
        try:
            self.module = create_feature_extractor(known, [layer], cuda=self.device.type == "cuda", verbose=False)
        except (OSError, RuntimeError) as error:  # torch.hub raises the latter without a network
            source = " from torch.hub's facebookresearch/dinov2" if is_dinov2(known) else ""
            raise ValueError(f"the weights of the extractor {name!r} cannot be loaded{source}: {error}") from error
        self.resize = "its own" if known in OWN else TENSORFLOW_RESIZE

    @torch.no_grad()
    def features(
        self, images: torch.Tensor | Dataset[torch.Tensor], batch_size: int = 64, progress: bool = False
    ) -> torch.Tensor:
        """Features `(N, D)`, on the CPU, of uint8 images `(N, 3, H, W)`; of no images `(0,)`."""
        batches = DataLoader(images, batch_size=batch_size)  # type: ignore[arg-type]
        bar = tqdm(batches, f"Features ({self.name})", disable=not progress, leave=False)
        return torch.cat([torch.empty(0), *(self.module(batch.to(self.device))[0].cpu() for batch in bar)])


def find_extractor(name: str) -> str:
    """torch-fidelity's name of an extractor.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If there is no such extractor; lists those there are.
    """
    registry = _registry()
    if ALIASES.get(name, name) not in registry:
        raise ValueError(f"extractor is {name!r}; it must be one of {', '.join([*ALIASES, *sorted(registry)])}")
    return ALIASES.get(name, name)


def is_dinov2(extractor: str | None) -> bool:
    """Whether this is a DINOv2 of torch-fidelity's, by its name there."""
    return extractor is not None and extractor.startswith("dinov2-vit-") and extractor not in OWN


def _torch_fidelity() -> Any:
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("FID and KID need torch-fidelity: pip install ofadiff[eval]") from error
    return torch_fidelity


def _registry() -> dict[str, Any]:
    return _torch_fidelity().registry.FEATURE_EXTRACTORS_REGISTRY


def _own_extractor_class() -> type[nn.Module]:
    # Its base class belongs to an optional dependency.
    class OwnExtractor(_torch_fidelity().FeatureExtractorBase):  # type: ignore[misc]
        """The module registered under the name that torch-fidelity makes it with."""

        def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
            super().__init__(name, features_list)
            self.module = copy.deepcopy(OWN[name])

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            features = self.module(images)
            if features.ndim != 2 or len(features) != len(images):
                raise ValueError(
                    f"the extractor {self.name!r} maps {tuple(images.shape)} to {tuple(features.shape)}; "
                    f"it must give ({len(images)}, D)"
                )
            return (features.float(),)

    return OwnExtractor

"""Adapters of the original model on an OFA pipeline whose own class can load them."""

from __future__ import annotations

from typing import Any

from ofadiff.supernet import Supernet


class AdapterOfOriginal:
    """What an `OFAPipeline` adds where the pipeline class has `load_lora_weights`."""

    supernet: Supernet | None
    _denoiser_name: str

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers, for a LoRA of the original model; it then follows the sizes.

        At size 1.0 the images are the original's with that LoRA; at every other size the LoRA acts as the fused
        original would, cut to that size.

        Raises:
            ValueError: If it is no plain LoRA; it is removed again then.
        """
        if self.supernet is None:
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, **kwargs)  # type: ignore[misc]
            return
        before = set(self._adapters())
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, **kwargs)  # type: ignore[misc]
        swapped = {adapter_name} if adapter_name is not None and kwargs.get("hotswap") else set()
        for name in (set(self._adapters()) - before) | swapped:
            try:
                self.supernet.adopt_adapter(name)
            except ValueError:
                self.delete_adapters(name)  # type: ignore[attr-defined]
                raise

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: IP-Adapter's projections have the original's full width and basis.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an IP-Adapter works with the original model only, not with the sizes of an OFA checkpoint")

    def _adapters(self) -> list[str]:
        return self.get_list_adapters().get(self._denoiser_name, [])  # type: ignore[attr-defined]

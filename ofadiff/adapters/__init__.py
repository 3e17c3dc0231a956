"""LoRAs: of the original model, which follow the sizes, and of one size, which belong to it."""

from ofadiff.adapters.size_adapter import SizeAdapter

__all__ = ["SizeAdapter"]

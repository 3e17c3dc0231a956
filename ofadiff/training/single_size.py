"""One size in training: an extracted model, or a LoRA of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.reading.json_file import read_object
from ofadiff.reading.tensors import read_tensors
from ofadiff.sizes import SizeTable

DESCRIPTION_NAME = "trained.json"
WEIGHTS_NAME = "trained.safetensors"


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that want gradients, by name: of a frozen model with a LoRA, that LoRA's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class SingleSize:
    """An extracted model in place of a supernet: what `train` and its checkpoints ask of either.

    Only what has `requires_grad` is trained, averaged and kept in checkpoints; so a LoRA in a frozen model is.

    Args:
        model: The extracted model.
        subnets: A table of its size alone.
        groups: The supernet's channel groups.
        description: JSON values that say what is trained, such as the LoRA's rank; a resumed run must have the same.
    """

    def __init__(
        self, model: ModelMixin, subnets: SizeTable, groups: Sequence[ChannelGroup], description: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.subnets = subnets
        self.groups = groups
        self.description = json.loads(json.dumps(description))

    @property
    def sizes(self) -> tuple[float, ...]:
        """Its size."""
        return self.subnets.sizes

    def set_size(self, size: float | str) -> None:
        """Raises ValueError unless this is its size."""
        self.subnets.find(size)

    @contextmanager
    def at(self, size: float | str) -> Iterator[ModelMixin]:
        """The model. Raises ValueError unless this is its size."""
        self.set_size(size)
        yield self.model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what is trained, and what that is."""
        directory = Path(directory)
        directory.mkdir(parents=True)
        weights = {name: weight.detach().contiguous() for name, weight in trained_weights(self.model).items()}
        save_file(weights, directory / WEIGHTS_NAME)
        (directory / DESCRIPTION_NAME).write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")

    def check(self, directory: str | Path) -> None:
        """Raises ValueError unless `save_pretrained` wrote the folder and it holds the same things trained."""
        path = Path(directory) / DESCRIPTION_NAME
        saved = read_object(path) if path.is_file() else {}
        for name in sorted(saved.keys() | self.description.keys()):
            if saved.get(name) != self.description.get(name):
                raise ValueError(
                    f"cannot resume from {path.parent.parent}: its {name} is {saved.get(name)}, this run's is "
                    f"{self.description.get(name)}"
                )

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Takes the weights that `save_pretrained` wrote.

        Raises:
            ValueError: If what they are is something else.
        """
        self.check(directory)
        saved = read_tensors(Path(directory) / WEIGHTS_NAME)
        for name, weight in trained_weights(self.model).items():
            found = tuple(saved[name].shape) if name in saved else None
            if found != tuple(weight.shape):
                raise ValueError(
                    f"{Path(directory) / WEIGHTS_NAME} has {name} of shape {found}; this run's is {tuple(weight.shape)}"
                )
            weight.copy_(saved[name])

"""Models whose weights FSDP has split over processes: the whole of a tensor, and a model's folder.

What makes wholes talks to all processes, so all of them have to call it, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ofadiff.storage.files import file_order, write_safetensors


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of a model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that a model had before FSDP split it."""
    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor; one that is not split is its own."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_whole(
    file: Path | None,
    like: Mapping[str, Tensor],
    whole: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file of whole tensors, of which no process holds more than one at a time.

    Args:
        file: The file; None in a process that only hands over its parts.
        like: For every name a tensor of the whole's shape and dtype.
        whole: Gives the whole of a name, see `gather`.
        metadata: See `write_safetensors`.
    """
    if file is not None:
        write_safetensors(file, like, whole, metadata)
        return
    for name in file_order(like):
        whole(name)


def save_split_model(model: ModelMixin, folder: Path | None, variant: str | None, max_shard_size: int | str) -> None:
    """Writes what diffusers' `save_pretrained` writes of a model that is not split, into a new folder.

    Args:
        model: The model.
        folder: The folder, which exists; None in a process that only hands over its parts.
        variant: Variant of the weight files.
        max_shard_size: Of one file, as diffusers takes it.
    """
    tensors = model.state_dict()
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    weights_name = _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    pattern = weights_name.replace(".safetensors", "{suffix}.safetensors")
    files = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size, filename_pattern=pattern)
    for file, names in files.filename_to_tensors.items():
        like = {name: empty[name] for name in names}
        where = None if folder is None else folder / file
        write_whole(where, like, lambda name: gather(tensors[name]), {"format": "pt"})
    if folder is None:
        return
    config = {**json.loads(model.to_json_string()), "_class_name": class_of(model).__name__}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)).write_text(text, encoding="utf-8")

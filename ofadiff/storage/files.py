"""Folders that are replaced as a whole, and safetensors files: which a model has, what is added to them."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant

from ofadiff.reading.json_file import check_object, read_object
from ofadiff.reading.names import file_in
from ofadiff.reading.tensors import open_tensors

# A safetensors file begins with the length of its header, which is JSON.
LENGTH_BYTES = 8


@contextmanager
def written_aside(folder: str | Path, keep: Callable[[Path], bool] = lambda entry: False) -> Iterator[Path]:
    """An empty folder beside another one; when the block ends without an error, it takes the other's place.

    A kill leaves the old folder or the new one, never some files of each. (Between two renames it may leave none: the
    old one then lies beside it under a hidden name, and the next call brings it back.)

    Args:
        folder: What to write or to replace; made with its parents if it is not there.
        keep: Which entries of the old folder come along if the block has not written one of that name.
    """
    folder, working_directory = Path(folder).resolve(), Path.cwd()
    unfinished, replaced = (folder.with_name(f".{folder.name}-{what}") for what in ("unfinished", "replaced"))
    if replaced.exists():  # a kill came in between
        if folder.exists():
            _bring_along(replaced, folder, keep)
        else:
            os.replace(replaced, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    if replaced.exists():
        _bring_along(replaced, folder, keep)
    if working_directory == folder:
        os.chdir(folder)  # it would go on in the folder that was replaced


def _bring_along(replaced: Path, folder: Path, keep: Callable[[Path], bool]) -> None:
    for entry in replaced.iterdir():
        if not (folder / entry.name).exists() and keep(entry):
            os.replace(entry, folder / entry.name)
    shutil.rmtree(replaced)


def add_to_safetensors(
    file: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Adds metadata and tensors to a safetensors file; what is in it is neither loaded nor changed.

    The library writes whole files only, and diffusers lets nobody say what metadata it writes.

    Args:
        file: The file.
        metadata: What to add; entries of these names are replaced.
        tensors: What to add, under names that the file does not have.
    """
    file = Path(file)
    added = safetensors.torch.save({name: tensor.contiguous() for name, tensor in (tensors or {}).items()})
    start = LENGTH_BYTES + int.from_bytes(added[:LENGTH_BYTES], "little")
    unfinished = file.with_name(f".{file.name}-unfinished")
    with file.open("rb") as old, unfinished.open("wb") as new:
        header = _read_header(old)
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        for name, entry in json.loads(added[LENGTH_BYTES:start]).items():
            header[name] = {**entry, "data_offsets": [end + offset for offset in entry["data_offsets"]]}
        new.write(_written(header))
        shutil.copyfileobj(old, new)
        new.write(added[start:])
    os.replace(unfinished, file)


def file_order(like: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors in the order in which they lie in a safetensors file: those of wide numbers first."""
    return sorted(like, key=lambda name: (-like[name].element_size(), name))


def write_safetensors(
    file: str | Path,
    like: Mapping[str, torch.Tensor],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file tensor by tensor; of one dtype byte for byte what the library writes from all at once.

    Args:
        file: The file.
        like: For every name a tensor of the shape and dtype that is to be written, such as one on the meta device.
        tensor_of: Gives the tensor of a name. It is asked once for each, in `file_order`, and what it gave is let go.
        metadata: What else to put into the header.

    Raises:
        ValueError: If a tensor has another shape or dtype than the one like it.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    dtypes: dict[torch.dtype, str] = {}
    end = 0
    for name in file_order(like):
        tensor = like[name]
        if tensor.dtype not in dtypes:  # the library's word for it
            sample = safetensors.torch.save({"": torch.empty(0, dtype=tensor.dtype)})
            dtypes[tensor.dtype] = _header_of(sample)[""]["dtype"]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    with Path(file).open("wb") as opened:
        opened.write(_written(header))
        for name in file_order(like):
            opened.write(_content(name, tensor_of(name), like[name]))


def _content(name: str, tensor: torch.Tensor, like: torch.Tensor) -> memoryview:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; the file was begun for {tuple(like.shape)} of "
            f"{like.dtype}"
        )
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _written(header: Mapping[str, Any]) -> bytes:
    """The beginning of a safetensors file."""
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % LENGTH_BYTES)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def _header_of(content: bytes) -> dict[str, Any]:
    return _read_header(io.BytesIO(content))


def _read_header(file: BinaryIO) -> dict[str, Any]:
    return json.loads(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")))


def weight_files(directory: Path, variant: str | None, name: str = SAFETENSORS_WEIGHTS_NAME) -> dict[Path, list[str]]:
    """The safetensors files of a model, each with the keys of the tensors to read from it.

    Args:
        directory: The model's folder.
        variant: Such as `"fp16"`, or None.
        name: What the file is called where there is one alone; by default as diffusers calls it.

    Raises:
        FileNotFoundError: If there are none of that variant, or one of several is missing.
        ValueError: If the index of several files is none, or names files elsewhere, or a file is damaged.
    """
    index = directory / _add_variant(f"{name}.index.json", variant)
    if index.is_file():
        files: dict[Path, list[str]] = {}
        weight_map = read_object(index, {"weight_map": dict})["weight_map"]
        check_object(weight_map, f"the weight_map of {index}", {})
        for key, shard in weight_map.items():
            files.setdefault(file_in(directory, shard, f"{index}: {key}"), []).append(key)
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names {missing[0].name}, which is not there")
        return files
    single = directory / _add_variant(name, variant)
    if not single.is_file():
        raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}")
    with open_tensors(single) as weights:
        return {single: list(weights.keys())}

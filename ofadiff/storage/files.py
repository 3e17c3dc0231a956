"""Folders that are replaced as a whole, and safetensors files: which a model has, what is added to them."""

from __future__ import annotations

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
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % LENGTH_BYTES)
        new.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
        shutil.copyfileobj(old, new)
        new.write(added[start:])
    os.replace(unfinished, file)


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

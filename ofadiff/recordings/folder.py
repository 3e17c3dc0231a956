"""Folders of recordings: one safetensors file for each call of the pipeline, and what they were made of.

A file is there as a whole or not at all, so a recording that was killed goes on with the calls that are missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ofadiff.reading.json_file import check_object, parse_json, read_object, shown
from ofadiff.reading.tensors import open_tensors, read_metadata
from ofadiff.recordings.nested import DTYPES, Tensors, digest_of, from_spec, tensor_names, to_spec
from ofadiff.recordings.recorded_call import Answer, RecordedCall
from ofadiff.storage.digest import digest_of_tensors, digest_of_weights

DESCRIPTION_NAME = "recordings.json"
CALLS = "calls"
FORMAT_VERSION = 1

# Where a file says what is in it, and what it says of each call.
KEY = "ofa_recording"
ENTRY = {"step", "args", "kwargs", "answer"}

# What two descriptions must have in common for the one recording to go on with the other, in the order of errors.
DESCRIBED = ("pipeline", "component", "denoiser", "dtype", "weights", "parameters", "steps_per_call", "seed", "calls")

# What of it is no string.
KINDS = {"parameters": list, "calls": list, "steps_per_call": int, "seed": int}


class Recordings(Sequence[RecordedCall]):
    """The recorded calls of a denoiser, in order; a call is read when it is asked for.

    Args:
        folder: What `ofadiff.record` made; one that was killed, or stopped at its limit, has fewer calls.

    Attributes:
        folder: Where they are.
        description: What they were made of, see `DESCRIBED`.

    Raises:
        ValueError: If the folder holds no recordings, or none of this format.

    Example:
        >>> recordings = ofadiff.record(pipeline, ["a"], "recordings")
        >>> recordings[0].kwargs["encoder_hidden_states"].shape
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        self.parameters = tuple(self.description["parameters"])
        self.dtype = DTYPES[self.description["dtype"]]
        self.pipeline_calls = recorded_calls(self.folder)
        self._entries: list[tuple[int, Any]] = []
        for number in self.pipeline_calls:
            self._entries += [(number, entry) for entry in _contents(call_file(self.folder, number))]
        if not self._entries:
            raise ValueError(f"{self.folder} holds no recorded call yet; the command that made it goes on with it")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """By position.

        Raises:
            ValueError: If its file is damaged, or not what was recorded.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number, entry = self._entries[index]
        path = call_file(self.folder, number)
        specs = entry["args"], entry["kwargs"], entry["answer"]
        try:
            with open_tensors(path) as file:
                # Copied: kernels may round otherwise where memory is not aligned as PyTorch aligns it.
                tensors = {name: file.get_tensor(name).clone() for name in set().union(*map(tensor_names, specs))}
            changed = sorted(name for name, tensor in tensors.items() if digest_of(tensor) != name)
            if changed:
                raise ValueError(f"the content of its tensor {changed[0]} is not what was recorded")
            args, kwargs, answer = (from_spec(spec, tensors) for spec in specs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(_damage(path, error)) from error
        return RecordedCall(args, kwargs, answer, self.parameters, self.dtype)

    def __iter__(self) -> Iterator[RecordedCall]:
        return (self[index] for index in range(len(self)))

    def pipeline_call(self, index: int) -> int:
        """Number of the pipeline's call that a recorded call belongs to."""
        return self._entries[index][0]

    @property
    def missing(self) -> int:
        """Calls of the pipeline that are not recorded, since that was killed or stopped at its limit."""
        return len(self.description["calls"]) - len(self.pipeline_calls)

    @property
    def bytes(self) -> int:
        """What they take on disk."""
        return sum(call_file(self.folder, number).stat().st_size for number in self.pipeline_calls)


def read_description(folder: Path) -> dict[str, Any]:
    """What recordings were made of.

    Raises:
        ValueError: If the folder holds none, or some of another format.
    """
    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION_NAME}, so no recordings; `ofadiff record` makes them")
    description = read_object(path)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r}; this ofadiff reads {FORMAT_VERSION}")
    absent = [name for name in DESCRIBED if name not in description]
    if absent or str(description["dtype"]) not in DTYPES:
        raise ValueError(f"{path} does not say what its {(absent or ['dtype'])[0]} is")
    check_object(description, str(path), KINDS)
    if not all(isinstance(name, str) for name in description["parameters"]):
        raise ValueError(f"{path} has the parameters {shown(description['parameters'])}; they must be names")
    return description


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Makes the folder of a recording."""
    (folder / CALLS).mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{DESCRIPTION_NAME}-{os.getpid()}"
    described = {"format_version": FORMAT_VERSION, **description}
    unfinished.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / DESCRIPTION_NAME)


def call_file(folder: Path, number: int) -> Path:
    """Where what was recorded of a call of the pipeline is."""
    return folder / CALLS / f"{number:06}.safetensors"


def recorded_calls(folder: Path) -> list[int]:
    """The calls of the pipeline that are recorded, ascending."""
    return sorted(int(file.stem) for file in (folder / CALLS).glob("*.safetensors") if file.stem.isdecimal())


def write_call(folder: Path, number: int, steps: Sequence[tuple[int, tuple, dict[str, Any], Answer, Tensors]]) -> int:
    """Writes what was recorded of one call of the pipeline; returns the bytes that it takes.

    Args:
        folder: Of the recording.
        number: Of the call.
        steps: For each call of the denoiser the step it belongs to, its arguments and its answer as specs, and their
            tensors.
    """
    tensors: Tensors = {}
    contents = []
    for step, args, kwargs, answer, own in steps:
        tensors |= own
        contents.append({"step": step, "args": args, "kwargs": kwargs, "answer": answer})
    file = call_file(folder, number)
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    save_file(tensors, unfinished, {KEY: json.dumps(contents)})
    os.replace(unfinished, file)
    return file.stat().st_size


def _contents(file: Path) -> list[Any]:
    """What a file holds. Raises ValueError if it is damaged."""
    try:
        contents = parse_json(read_metadata(file)[KEY], f"what {file} says of itself")
    except (KeyError, ValueError) as error:
        raise ValueError(_damage(file, error)) from error
    entries = contents if isinstance(contents, list) else [None]
    if not all(isinstance(entry, dict) and entry.keys() >= ENTRY for entry in entries):
        raise ValueError(_damage(file, f"its calls are {shown(contents)}"))
    return contents


def _damage(file: Path, what: Exception | str) -> str:
    said = repr(what) if isinstance(what, KeyError | AttributeError) else what
    return f"{file} is damaged; remove it, and record its call again: {said}"


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError if recordings were made of something else than what is asked for."""
    for name in DESCRIBED:
        if old[name] != new[name]:
            if name == "calls":
                raise ValueError(
                    f"{folder} holds recordings of other calls ({len(old[name])}, not these {len(new[name])}); give "
                    "another folder for these"
                )
            raise ValueError(
                f"{folder} holds recordings whose {name} is {old[name]}, not {new[name]}; give another folder"
            )


def check_same_model(
    recordings: Recordings,
    pipeline: str,
    component: str,
    denoiser: nn.Module | None = None,
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """Raises ValueError if recordings are of another pipeline class, or another denoiser.

    Args:
        recordings: What was recorded.
        pipeline: Class of the pipeline.
        component: What it calls its denoiser.
        denoiser: The denoiser, if its weights shall be compared too.
        adapter: Tensors of the LoRA that its largest size has beside them.
    """
    expected: dict[str, Any] = {"pipeline": pipeline, "component": component}
    if denoiser is not None:
        expected |= {"denoiser": type(denoiser).__name__, "weights": digest_in(denoiser, recordings.dtype, adapter)}
    for name, value in expected.items():
        if recordings.description[name] != value:
            raise ValueError(
                f"{recordings.folder} was recorded of another model: its {name} is {recordings.description[name]}, "
                f"this model's is {value}"
            )


def digest_in(denoiser: nn.Module, dtype: torch.dtype, adapter: Mapping[str, Tensor] | None = None) -> str:
    """Digest of weights as they are in a dtype, whichever they were loaded in, and of what an adapter adds to them."""
    digest = digest_of_weights(denoiser, dtype)
    return f"{digest}, with an adapter of {digest_of_tensors(adapter, dtype)}" if adapter else digest


def specs_of(args: tuple, kwargs: Mapping[str, Any], parameters: Sequence[str], tensors: Tensors) -> tuple[Any, Any]:
    """Arguments of a denoiser as specs. Raises UnrecordableError naming what cannot be kept."""
    names = [*parameters[: len(args)], *map(str, range(len(parameters), len(args)))]
    entries = [
        to_spec(value, tensors, f"the denoiser's argument {name}") for name, value in zip(names, args, strict=True)
    ]
    by_name = [[key, to_spec(value, tensors, f"the denoiser's argument {key}")] for key, value in kwargs.items()]
    return {"tuple": entries}, {"dict": by_name}

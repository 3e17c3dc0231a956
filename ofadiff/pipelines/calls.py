"""Calls of a pipeline as a user writes them: prompts, or the arguments of the pipeline's own call."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image

from ofadiff.data.decoding import open_image
from ofadiff.data.text import read_lines, read_table, read_text
from ofadiff.reading.arguments import check_argument
from ofadiff.reading.json_file import is_kind, parse_json

Arguments = dict[str, Any]

# Arguments whose strings are paths of images, by their names.
IMAGE_WORDS = ("image", "images", "mask", "video", "frames")

# Column of prompts in files of captions.
CAPTION = "text"


def read_calls(file: str | Path) -> list[str | Arguments]:
    """Calls of a pipeline, in the order of a file.

    Args:
        file: By its ending: `.jsonl` with an object of arguments or a prompt a line, `.json` with a list of such,
            `.csv` or `.tsv` with a column for each argument (empty ones are not given), or any other text with one
            prompt a line. Empty lines are skipped. The encoding is UTF-8, or what a byte order mark says.

    Raises:
        ValueError: If there is no such file, it is no text of that kind, or there are no calls in it.

    Example:
        >>> calls = read_calls("calls.jsonl")
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file of calls")
    calls = READERS.get(file.suffix.lower(), _lines)(file)
    if not calls:
        raise ValueError(f"there are no calls in {file}")
    return calls


def read_located_calls(file: str | Path) -> list[str | Arguments]:
    """As `read_calls`, with paths of images as they are found from here.

    Raises:
        ValueError: As `read_calls`; or if an image is missing or none.
    """
    folder = Path(file).parent
    return [
        call
        if isinstance(call, str)
        else {
            name: _located(value, folder, f"call {number}: {name}") if is_image(name) else value
            for name, value in call.items()
        }
        for number, call in enumerate(read_calls(file), 1)
    ]


def check_calls(
    pipeline_class: type[DiffusionPipeline],
    calls: Sequence[str | Mapping[str, Any]],
    shared: Mapping[str, Any] | None = None,
    folder: str | Path = ".",
) -> list[Arguments]:
    """The arguments of each call, images still by their paths; what is wrong with any of them is found out here.

    Args:
        pipeline_class: Class of the pipeline.
        calls: Prompts, or arguments of the pipeline's own call.
        shared: Arguments of all calls that do not have their own.
        folder: What paths of images are relative to.

    Raises:
        ValueError: If there is no call, a call has an argument that the pipeline does not take, or lacks one that it
            needs, or an image is missing or none.
    """
    if isinstance(calls, (str, Mapping)):
        raise ValueError(f"calls is one {type(calls).__name__}; give a list of prompts, or of dicts of arguments")
    check_argument("calls", calls, isinstance(calls, Sequence), "a list of prompts, or of dicts of arguments")
    if not calls:
        raise ValueError("there is no call; give at least one")
    signature = inspect.signature(pipeline_class.__call__)
    return [
        _checked(pipeline_class, signature, call, shared or {}, Path(folder), f"call {number}")
        for number, call in enumerate(calls, 1)
    ]


def _checked(
    pipeline_class: type, signature: inspect.Signature, call: Any, shared: Mapping[str, Any], folder: Path, where: str
) -> Arguments:
    takes = [name for name in signature.parameters if name != "self"]
    others = [name for name, each in signature.parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD]
    takes = [name for name in takes if name not in others]
    # diffusers' own classes take any name only to say which ones are no more, and let a wrong one pass.
    any_name = bool(others) and not pipeline_class.__module__.startswith("diffusers.")
    if isinstance(call, str):
        if "prompt" not in takes:
            raise ValueError(
                f"{where} is a prompt, which {pipeline_class.__name__} does not take; it takes {_listed(takes)}"
            )
        call = {"prompt": call}
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is a {type(call).__name__}; it must be a prompt, or a dict of arguments")
    if CAPTION in call and "prompt" not in call and "prompt" in takes and CAPTION not in takes:
        call = {"prompt" if name == CAPTION else name: value for name, value in call.items()}
    arguments = {**shared, **call}
    for name in arguments:
        if name not in takes and not any_name:
            raise ValueError(
                f"{where} has the argument {name!r}, which {pipeline_class.__name__} does not take; it takes "
                f"{_listed(takes)}"
            )
    steps = arguments.get("num_inference_steps", 1)
    if steps is not None and not (is_kind(steps, int) and steps >= 1):
        raise ValueError(f"{where} has num_inference_steps {steps!r}; it must be a whole number of at least 1")
    try:
        signature.bind(None, **arguments)
    except TypeError as error:
        raise ValueError(f"{where} of {pipeline_class.__name__}: {error}") from None
    return {
        name: _located(value, folder, f"{where}: {name}") if is_image(name) else value
        for name, value in arguments.items()
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def is_image(name: str) -> bool:
    """Whether strings of an argument are paths of images."""
    return not name.endswith("prompt") and bool(set(name.split("_")) & set(IMAGE_WORDS))


def _located(value: Any, folder: Path, where: str) -> Any:
    """Paths of images as they are found from here."""
    if isinstance(value, (list, tuple)):
        return [_located(entry, folder, where) for entry in value]
    if not isinstance(value, (str, Path)):
        return value
    path = folder / value
    if not path.is_file():
        raise ValueError(f"{where} {path} is no file")
    try:
        with open_image(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} {path} is no image: {error}") from error
    return path


def opened(arguments: Mapping[str, Any]) -> Arguments:
    """The arguments with images in place of their paths."""
    return {name: _opened(value) if is_image(name) else value for name, value in arguments.items()}


def _opened(value: Any) -> Any:
    if isinstance(value, list):
        return [_opened(entry) for entry in value]
    return load_image(open_image(value)) if isinstance(value, Path) else value


@contextmanager
def without_bar(pipeline: Any) -> Iterator[None]:
    """A block in which a pipeline shows no bar of its own."""
    before = dict(vars(pipeline).get("_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def described(value: Any) -> Any:
    """An argument as JSON, to be compared and shown: what is no JSON by the digest of its content."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return {"image": hashlib.sha256(value.read_bytes()).hexdigest()}
    if isinstance(value, Image.Image):
        return {"image": hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).hexdigest()}
    return {type(value).__name__: repr(value)}


# Files of calls


def _lines(file: Path) -> list[str | Arguments]:
    return [line.strip() for line in read_lines(file) if line.strip()]


def _json_lines(file: Path) -> list[str | Arguments]:
    lines = ((number, line) for number, line in enumerate(read_lines(file), 1) if line.strip())
    return [_call(parse_json(line, f"{file}, line {number}"), f"{file}, line {number}") for number, line in lines]


def _json_list(file: Path) -> list[str | Arguments]:
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a {type(entries).__name__}; it must be a list of calls")
    return [_call(entry, f"{file}, entry {number}") for number, entry in enumerate(entries, 1)]


def _table(file: Path) -> list[str | Arguments]:
    calls: list[str | Arguments] = []
    for number, row in enumerate(read_table(file)[1], 1):
        if None in row:
            raise ValueError(f"{file}, row {number} has more cells than its first line names")
        calls.append({name.strip(): _cell(name, cell) for name, cell in row.items() if name and cell})
    return calls


def _cell(name: str, cell: str) -> Any:
    """A number, a list or the like where a cell is one; prompts stay as they are written."""
    if name.strip() == CAPTION or "prompt" in name:
        return cell
    return parsed_value(cell)


def parsed_value(text: str) -> Any:
    """A word as JSON if it is some, otherwise as it is."""
    try:
        return parse_json(text, text)
    except ValueError:
        return text


def _call(entry: Any, where: str) -> str | Arguments:
    if not isinstance(entry, (str, dict)):
        raise ValueError(f"{where} is a {type(entry).__name__}; it must be a prompt, or an object of arguments")
    return entry


# By the ending of the file's name.
READERS: dict[str, Callable[[Path], list[str | Arguments]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}

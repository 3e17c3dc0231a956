"""One recorded call of a denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ofadiff.recordings.nested import map_tensors

# What denoisers call the time, the first that they have counts.
TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "vision_timesteps")

# What a denoiser puts out: tensors `(N, …)`, or lists of N tensors.
Answer = tuple[Tensor | list[Tensor], ...]


@dataclass(frozen=True)
class RecordedCall:
    """What a denoiser was called with, as it was, and what it answered.

    Attributes:
        args: Arguments by position.
        kwargs: Arguments by name.
        answer: What it put out, one entry for each output: a tensor `(N, …)`, or a list of N tensors.
        parameters: Names of the forward's parameters, in order.
        dtype: Of the denoiser that was recorded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Answer
    parameters: tuple[str, ...]
    dtype: torch.dtype

    def replay(self, model: nn.Module) -> Answer:
        """What a model answers to the same call."""
        with torch.no_grad():
            return answer_of(model(*self.args, **self.kwargs))

    @property
    def rows(self) -> int:
        """N: samples that the denoiser had at once, both halves of guidance counted where they came together."""
        return len(self.answer[0])

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.parameters, self.args, strict=False)), **self.kwargs}

    @property
    def time(self) -> str | None:
        """Name of the argument that is the time; None if there is none that is known."""
        return time_argument(self.parameters)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RecordedCall:
        """The call with its tensors on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        args, kwargs, answer = (map_tensors(moved, value) for value in (self.args, self.kwargs, self.answer))
        return RecordedCall(args, kwargs, answer, self.parameters, self.dtype)


class RecordedKeywords(dict[str, Any]):
    """Keyword arguments of one forward out of a recording; its batch may be more than one.

    Attributes:
        rows: Samples of the batch.
    """

    def __init__(self, arguments: Mapping[str, Any], rows: int) -> None:
        super().__init__(arguments)
        self.rows = rows


def in_dtype(
    arguments: Mapping[str, Any], dtype: torch.dtype, time: str | None, own: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments as a denoiser of another precision is called with them.

    Args:
        arguments: By name.
        dtype: What floating-point tensors shall be in.
        time: Name of the argument that is the time; it stays what it is, for the denoiser to embed: bfloat16 knows two
            of 998, 999 and 1000 at most.
        own: Precision that they were recorded in: only tensors in it change; by default all do.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and own in (None, tensor.dtype) else tensor

    return {name: value if name == time else map_tensors(cast, value) for name, value in arguments.items()}


def time_argument(parameters: tuple[str, ...]) -> str | None:
    """Which of a forward's parameters is the time; None if there is none that is known."""
    return next((name for name in TIMES if name in parameters), None)


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """Names of a forward's parameters that can be given by position, in order, then those by name alone.

    They are its class's: hooks of accelerate and diffusers put another `forward` on the instance.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(model).forward).parameters
    return tuple(name for name, each in parameters.items() if each.kind in kinds and name != "self")


def answer_of(output: Any) -> Answer:
    """The tensors that a denoiser puts out.

    Raises:
        TypeError: If there are none, or something that is neither a tensor nor a list of them.
    """
    if isinstance(output, Tensor):
        return (output,)
    entries = output.to_tuple() if isinstance(output, BaseOutput) else output
    if isinstance(entries, tuple):
        entries = tuple(entry for entry in entries if entry is not None)
        if entries and all(map(_is_answer, entries)):
            return entries
    raise TypeError(f"the denoiser put out a {type(output).__name__}; expected tensors, or lists of tensors")


def _is_answer(entry: Any) -> bool:
    return isinstance(entry, Tensor) or (
        isinstance(entry, list) and bool(entry) and all(isinstance(each, Tensor) for each in entry)
    )


def answer_rows(answer: Answer) -> Tensor:
    """An answer as one tensor with a row for each sample: as it is, or flat where it has several parts, `(N, …)`.

    Rows of unequal length, which only lists have, end in zeros.
    """
    if len(answer) == 1 and isinstance(answer[0], Tensor):
        return answer[0]
    parts = []
    for entry in answer:
        if isinstance(entry, Tensor):
            parts.append(entry.flatten(1))
        else:
            parts.append(nn.utils.rnn.pad_sequence([each.flatten() for each in entry], batch_first=True))
    return torch.cat(parts, dim=1)

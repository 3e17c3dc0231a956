"""One call of a denoiser in two: the halves of its batch, and what they put out together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ofadiff.recordings.recorded_call import answer_of, answer_rows

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# How far answers of halves may be from those of the whole batch, relative to their norm: by the dtype's precision,
# since other batches are computed in another order, and at least this.
TOLERANCE, LEAST_TOLERANCE = 32, 1e-3


def halves_of(arguments: Arguments, rows: int, multiples: bool = False) -> tuple[Arguments, Arguments]:
    """A call's arguments for the first and for the second half of its batch.

    Args:
        arguments: By position and by name.
        rows: Samples of the batch, an even number. Tensors and lists with so many entries are split.
        multiples: Whether to split those with several times as many entries too, such as one for each frame.
    """
    args, kwargs = arguments
    first, second = ((_half(args, rows, half, multiples), _half(kwargs, rows, half, multiples)) for half in (0, 1))
    return first, second


def _half(value: Any, rows: int, half: int, multiples: bool) -> Any:
    if isinstance(value, Tensor):
        entries = len(value) if value.ndim else 0
        splits = entries == rows or (multiples and entries > rows and entries % rows == 0)
        return value.chunk(2)[half] if splits else value
    if type(value) is list and len(value) == rows and not any(_has_rows(entry, rows) for entry in value):
        return value[: rows // 2] if half == 0 else value[rows // 2 :]
    if type(value) in (list, tuple):
        return type(value)(_half(entry, rows, half, multiples) for entry in value)
    if isinstance(value, dict):
        return {key: _half(entry, rows, half, multiples) for key, entry in value.items()}
    return value


def _has_rows(entry: Any, rows: int) -> bool:
    return isinstance(entry, Tensor) and entry.ndim > 0 and len(entry) == rows


def are_twins(batch: Any) -> bool:
    """Whether the first half of a batch of latents, `(N, …)` or a list of N, equals the second."""
    if len(batch) % 2 or not len(batch):
        return False
    half = len(batch) // 2
    return same(batch[:half], batch[half:])


def same(first: Any, second: Any) -> bool:
    """Whether two batches of latents, tensors or lists of them, are equal."""
    if first is second:
        return True
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if not isinstance(second, Sequence) or len(first) != len(second):
        return False
    return all(map(same, first, second))


def combined(function: Callable[..., Any], first: Any, second: Any) -> Any:
    """What denoisers put out, of the same kind, with a function of both in every tensor's or list's place.

    Raises:
        TypeError: If they hold something else than tensors and lists of them.
    """
    if isinstance(first, Tensor) or type(first) is list:
        return function(first, second)
    if isinstance(first, BaseOutput):
        return type(first)(**{key: combined(function, first[key], second[key]) for key in first})
    if type(first) is tuple:
        return tuple(combined(function, *entries) for entries in zip(first, second, strict=True))
    if first is None:
        return None
    raise TypeError(f"the denoiser put out a {type(first).__name__}; expected tensors, or lists of tensors")


def together(first: Any, second: Any) -> Any:
    """What two halves put out, as one batch."""
    return combined(lambda one, other: one + other if isinstance(one, list) else torch.cat([one, other]), first, second)


def close(whole: Any, parts: Any) -> bool:
    """Whether two outputs of a denoiser are equal but for rounding."""
    one, other = answer_rows(answer_of(whole)), answer_rows(answer_of(parts))
    if one.shape != other.shape:
        return False
    tolerance = max(TOLERANCE * torch.finfo(one.dtype).eps, LEAST_TOLERANCE)
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= tolerance * one.norm())


def in_halves(call: Callable[..., Any], arguments: Arguments, rows: int) -> bool | None:
    """How a call can be split: whether with `multiples`, or None if its halves do not put out what the whole does.

    It is tried: the denoiser is called once with the batch and once, or twice, with halves of it.
    """
    whole = call(*arguments[0], **arguments[1])
    for multiples in (False, True):
        try:
            outputs = [call(*args, **kwargs) for args, kwargs in halves_of(arguments, rows, multiples)]
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        if close(whole, together(*outputs)):
            return multiples
    return None


def shapes(value: Any) -> Any:
    """Of arguments, what decides how they are split."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes, value))
    if isinstance(value, Mapping):
        return tuple((key, shapes(entry)) for key, entry in value.items())
    return None

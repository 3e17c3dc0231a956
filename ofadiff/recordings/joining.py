"""Several recorded calls as one forward, where they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.recordings.recorded_call import RecordedCall, answer_of, answer_rows, in_dtype

# How far the answers of a joined forward may be from those of single ones, relative to the largest, by the dtype's own
# precision: other batches are computed in another order.
TOLERANCE = 256


def outline(call: RecordedCall) -> str:
    """What two calls must have in common to be joined, but for the content of what they share."""
    arguments = {name: _outline(value, call.rows) for name, value in call.arguments.items() if name != call.time}
    answer = [_outline(entry, call.rows) for entry in call.answer]
    return repr((arguments, answer, _is_time(call)))


def join(calls: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Calls with those that are alike put together, in the order in which the first of each kind comes.

    What has one entry for each sample (a tensor, or a list) is put in a row; times are given to each sample; anything
    else has to be equal.

    Args:
        calls: On one device.
    """
    joined: dict[str, list[list[RecordedCall]]] = {}
    for call in calls:
        alike = joined.setdefault(outline(call), [])
        for others in alike:
            if _share(others[0], call):
                others.append(call)
                break
        else:
            alike.append([call])
    return [_joined(parts) for alike in joined.values() for parts in alike]


@torch.no_grad()
def can_be_joined(model: nn.Module, calls: Sequence[RecordedCall]) -> bool:
    """Whether a model answers to calls in one forward what it has answered to them one by one; tried on some.

    Args:
        model: The original, in eval mode, on the device of the calls.
        calls: Some that are alike; with none that are there is nothing to be tried, and nothing to be won.
    """
    alike: dict[str, list[RecordedCall]] = {}
    for call in calls:
        alike.setdefault(outline(call), []).append(call)
    several = max(alike.values(), key=len, default=[])
    parts = join(several)
    if len(several) < 2 or len(parts) > 1:
        return False
    dtype = next(model.parameters()).dtype

    def answers_to(call: RecordedCall) -> Tensor:
        return answer_rows(answer_of(model(**in_dtype(call.arguments, dtype, call.time, call.dtype)))).flatten(1)

    single = torch.cat([answers_to(call) for call in several])
    try:
        together = answers_to(parts[0])
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    tolerance = TOLERANCE * torch.finfo(single.dtype).eps
    return together.shape == single.shape and bool(
        (together - single).abs().max() <= tolerance * single.abs().max().clamp_min(torch.finfo(single.dtype).tiny)
    )


def _is_time(call: RecordedCall) -> bool:
    """Whether the time is a tensor that each sample can be given: one number for all, or one for each."""
    time = call.arguments.get(call.time or "")
    return isinstance(time, Tensor) and (time.ndim == 0 or len(time) in (1, call.rows))


def _outline(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        is_rows = value.ndim > 0 and len(value) == rows
        return "tensor", is_rows, tuple(value.shape[is_rows:]), value.dtype
    if isinstance(value, list) and len(value) == rows:
        return "rows", [_outline(entry, -1) for entry in value[:1]]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_outline(entry, rows) for entry in value]
    if isinstance(value, dict):
        return {key: _outline(entry, rows) for key, entry in value.items()}
    return repr(value)


def _share(first: RecordedCall, second: RecordedCall) -> bool:
    """Whether what two calls of one outline do not have for each sample is equal."""
    if not _is_time(first):
        return _equal(first.arguments.get(first.time or ""), second.arguments.get(first.time or ""), 0)
    return all(
        _equal(value, second.arguments[name], first.rows)
        for name, value in first.arguments.items()
        if name != first.time
    )


def _equal(first: Any, second: Any, rows: int) -> bool:
    if isinstance(first, Tensor):
        return (first.ndim > 0 and len(first) == rows) or torch.equal(first, second)
    if isinstance(first, list) and len(first) == rows:
        return True
    if isinstance(first, (list, tuple)):
        return all(_equal(one, other, rows) for one, other in zip(first, second, strict=True))
    if isinstance(first, dict):
        return all(_equal(value, second[key], rows) for key, value in first.items())
    return True


def _joined(calls: Sequence[RecordedCall]) -> RecordedCall:
    if len(calls) == 1:
        return calls[0]
    first = calls[0]
    arguments = {}
    for name in first.arguments:
        values = [call.arguments[name] for call in calls]
        if name == first.time:
            arguments[name] = torch.cat([_for_each(time, call.rows) for time, call in zip(values, calls, strict=True)])
        else:
            arguments[name] = _together(values, first.rows)
    answer = tuple(
        _together(list(entries), first.rows) for entries in zip(*(call.answer for call in calls), strict=True)
    )
    return RecordedCall((), arguments, answer, first.parameters, first.dtype)


def _for_each(time: Tensor, rows: int) -> Tensor:
    if time.ndim == 0:
        return time.expand(rows)
    return time if len(time) == rows else time.expand(rows, *time.shape[1:])


def _together(values: list[Any], rows: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.ndim > 0 and len(first) == rows else first
    if isinstance(first, list) and len(first) == rows:
        return [entry for value in values for entry in value]
    if isinstance(first, (list, tuple)):
        return type(first)(_together([value[number] for value in values], rows) for number in range(len(first)))
    if isinstance(first, dict):
        return {key: _together([value[key] for value in values], rows) for key in first}
    return first

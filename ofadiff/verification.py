"""Whether channel groups are what they say, decided by trying on the real model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ofadiff.channels import ChannelGroup, row_axis
from ofadiff.cutting import make_model_elastic, permute_units, set_widths
from ofadiff.layers import NORMS_OVER_CHANNELS, shrink
from ofadiff.recordings.folder import Recordings
from ofadiff.recordings.recorded_call import RecordedCall


@torch.no_grad()
def verify_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Mapping[str, Any] | RecordedCall | Recordings,
    tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, float]:
    """Tries every group: reordering its units must change nothing, and cutting it must equal masking it.

    Works on a float64 copy of the model, so rounding does not hide a wrong group (valid ones stay under 1e-10, or 1e-6
    where a block computes in float32 itself).

    Args:
        model: The denoiser, not elastic yet; unchanged afterwards.
        groups: Its channel groups.
        inputs: Keyword arguments of one forward call, or recordings of the model, whose first call is taken.
        tolerance: Largest accepted error, relative to the largest output.
        dtype: Dtype of the copy. A model that runs in float32 only needs a tolerance of 1e-4.

    Returns:
        For every group the larger of its two errors.

    Raises:
        ValueError: If a group is wrong; names it, what was tried and the error.
    """
    # Not the method of diffusers models, which leaves some layers in float32.
    model = nn.Module.to(copy.deepcopy(model), dtype).eval()
    first = inputs[0] if isinstance(inputs, Recordings) else inputs
    on_device = first.to(next(model.parameters()).device).arguments if isinstance(first, RecordedCall) else first
    converted = _converted(dict(on_device), dtype)
    reference = _output(model, converted)
    scale = reference.abs().max()

    def error_of(tried: nn.Module, expected: torch.Tensor) -> float:
        return float((_output(tried, converted) - expected).abs().max() / scale)

    elastic = copy.deepcopy(model)
    make_model_elastic(elastic, groups)
    full = {group.name: group.width for group in groups}
    errors: dict[str, float] = {}
    for group in groups:
        backwards = torch.arange(group.width - 1, -1, -1)
        permute_units(model, group, backwards)
        reordering = error_of(model, reference)
        permute_units(model, group, backwards)
        _check(group, "reordering its units", reordering, tolerance)

        errors[group.name] = reordering
        for kept in (max(1, group.width // 2), *([0] if group.droppable else [])):
            with _masked(model, group, kept):
                expected = _output(model, converted)
            set_widths(elastic, groups, {**full, group.name: kept})
            what = f"keeping {kept} of {group.width} units"
            try:
                cutting = error_of(elastic, expected)
            except RuntimeError as error:
                raise ValueError(f"{group.name} is no channel group: {what} failed: {error}") from error
            _check(group, what, cutting, tolerance)
            errors[group.name] = max(errors[group.name], cutting)
    return errors


def _check(group: ChannelGroup, what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise ValueError(f"{group.name} is no channel group: {what} gave a relative error of {error:.1e}")


@contextmanager
def _masked(model: nn.Module, group: ChannelGroup, kept: int) -> Iterator[None]:
    """Zeroes, at full size, everything that the units from `kept` on own; norms over channels see the others only."""
    modules = {part.module: model.get_submodule(part.module) for part in group.slices}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    hooks = []
    for part in group.slices:
        module = modules[part.module]
        entries = part.start + part.indices(torch.arange(part.units)).view(part.repeats, part.units, part.channels)
        dropped = entries[:, kept:].reshape(-1)
        if part.axis == "out" and isinstance(module, NORMS_OVER_CHANNELS):
            small = copy.deepcopy(module)
            shrink(small, part.module, ((part, kept),))
            hooks.append(module.register_forward_hook(_NormOverKept(small, entries[:, :kept].reshape(-1))))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if part.axis == "out":
                parameter.movedim(row_axis(parameter.shape), 0)[dropped] = 0
            elif name == "weight":
                parameter[:, dropped] = 0
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, state in before.items():
            modules[name].load_state_dict(state)


class _NormOverKept:
    """What a norm over channels makes of the kept ones when the others are not there, with zeros for these."""

    def __init__(self, small: nn.Module, kept: torch.Tensor) -> None:
        self.small, self.kept = small, kept

    def __call__(self, norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        masked = torch.zeros_like(output)
        masked[..., self.kept] = self.small(args[0][..., self.kept]).to(output.dtype)
        return masked


def _output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Everything that the model returns, in one row."""
    return torch.cat([tensor.flatten() for tensor in tree_leaves(model(**inputs))])


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _converted(entry, dtype) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(entry, dtype) for entry in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value

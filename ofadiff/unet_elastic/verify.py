"""Whether channel groups are what they say, decided by trying on the real model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.elastic import make_model_elastic, permute_units, set_widths


@torch.no_grad()
def verify_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], inputs: Mapping[str, Any], tolerance: float = 1e-6
) -> dict[str, float]:
    """Tries every group: reordering its units must change nothing, and cutting it must equal masking it.

    Works on a float64 copy of the model, so rounding does not hide a wrong group (valid ones stay under 1e-10).

    Args:
        model: The denoiser, not elastic yet; unchanged afterwards.
        groups: Its channel groups.
        inputs: Keyword arguments of one forward call.
        tolerance: Largest accepted error, relative to the largest output.

    Returns:
        For every group the larger of its two errors.

    Raises:
        ValueError: If a group is wrong; names it, what was tried and the error.
    """
    model = copy.deepcopy(model).double().eval()
    doubled = _to_double(dict(inputs))
    reference = _output(model, doubled)
    scale = reference.abs().max()

    def error_of(tried: nn.Module, expected: torch.Tensor) -> float:
        return float((_output(tried, doubled) - expected).abs().max() / scale)

    elastic = copy.deepcopy(model)
    make_model_elastic(elastic, groups)
    full = {group.name: group.width for group in groups}
    errors: dict[str, float] = {}
    for group in groups:
        permuted = copy.deepcopy(model)
        permute_units(permuted, group, torch.arange(group.width - 1, -1, -1))
        reordering = error_of(permuted, reference)
        _check(group, "reordering its units", reordering, tolerance)

        kept = max(1, group.width // 2)
        masked = copy.deepcopy(model)
        _mask_units(masked, group, kept)
        set_widths(elastic, groups, {**full, group.name: kept})
        what = f"keeping {kept} of {group.width} units"
        try:
            cutting = error_of(elastic, _output(masked, doubled))
        except RuntimeError as error:
            raise ValueError(f"{group.name} is no channel group: {what} failed: {error}") from error
        _check(group, what, cutting, tolerance)
        errors[group.name] = max(reordering, cutting)
    return errors


def _check(group: ChannelGroup, what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise ValueError(f"{group.name} is no channel group: {what} gave a relative error of {error:.1e}")


def _mask_units(model: nn.Module, group: ChannelGroup, kept: int) -> None:
    """Zeroes, at full size, everything that the units from `kept` on own."""
    dropped = torch.arange(kept, group.width)
    for part in group.slices:
        entries = part.start + part.indices(torch.arange(part.units)).view(part.repeats, part.units, part.channels)
        entries = entries[:, dropped].reshape(-1)
        for name, parameter in model.get_submodule(part.module).named_parameters(recurse=False):
            if part.axis == "out":
                parameter[entries] = 0
            elif name == "weight":
                parameter[:, entries] = 0


def _output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def _to_double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_double(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value

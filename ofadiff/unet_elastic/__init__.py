"""Finders: one function per kind of block that says which channels exist together, and the table of them."""

from __future__ import annotations

import re
import warnings

from torch import nn

from ofadiff.channels import ChannelGroup
from ofadiff.reading.arguments import check_argument
from ofadiff.unet_elastic.finders import FINDERS
from ofadiff.unet_elastic.unsupported import UnsupportedBlockError
from ofadiff.verification import verify_groups

__all__ = ["FINDERS", "UnsupportedBlockError", "elastic_parameters", "find_channel_groups", "verify_groups"]

_STAGE = re.compile(r"(?:down_blocks|up_blocks)\.\d+|mid_block")


def find_channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """Every internal width of a denoiser that can shrink.

    Only internal widths are found, so the residual stream, skip connections and block outputs keep their shape.

    Args:
        model: A diffusers denoiser made of known blocks (`FINDERS`); may be on the meta device.

    Returns:
        The groups in the order of the model's modules.

    Warns:
        UserWarning: If blocks of a known kind stay rigid; names them, the reasons and the share that stays elastic.

    Raises:
        ValueError: If no block of the model is known.

    Example:
        >>> groups = find_channel_groups(unet)
        >>> groups[0].name, groups[0].kind, groups[0].width, groups[0].channels_per_unit
        ('down_blocks.0.resnets.0', 'convolution', 8, 4)
    """
    groups: list[ChannelGroup] = []
    rigid: dict[str, list[str]] = {}
    check_argument("model", model, isinstance(model, nn.Module), "a denoiser, a torch.nn.Module")
    for name, module in model.named_modules():
        finder = FINDERS.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if finder is None:
            continue
        try:
            groups += finder(name, module, _stage_of(name))
        except UnsupportedBlockError as reason:
            groups += reason.groups
            rigid.setdefault(str(reason), []).append(name)
    if not groups:
        reasons = _listed(rigid) or "known blocks are listed in ofadiff.unet_elastic.FINDERS"
        raise ValueError(f"{type(model).__name__} has no block that can be cut; {reasons}")
    if rigid:
        share = elastic_parameters(model, groups) / sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(f"{share:.0%} of the parameters are elastic; {_listed(rigid)}", stacklevel=2)
    return groups


def _listed(rigid: dict[str, list[str]]) -> str:
    """Why which blocks stay rigid, in one line."""
    return "; ".join(
        f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} stays rigid: {reason}"
        for reason, names in rigid.items()
    )


def elastic_parameters(model: nn.Module, groups: list[ChannelGroup]) -> int:
    """Parameters of the modules that some group cuts."""
    modules = {part.module for group in groups for part in group.slices}
    return sum(p.numel() for name in modules for p in model.get_submodule(name).parameters(recurse=False))


def _stage_of(name: str) -> str:
    """The resolution block that a module belongs to; outside a UNet's path, its top-level container."""
    match = _STAGE.match(name)
    return match.group() if match else name.split(".")[0]

"""The layers that read the channels of groups, in the order in which a forward calls them, and what they are called
with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.channels import ChannelGroup, Slice, active_part, slices_by_module
from ofadiff.cutting import kept_by_module
from ofadiff.sizes import Subnet

# A weight and a bias, which a layer may lack.
Parameters = tuple[Tensor, Tensor | None]


def find_readers(groups: Sequence[ChannelGroup]) -> list[str]:
    """Names of the layers that read channels of groups and write to what no group cuts: the ends of branches."""
    return [name for name, parts in slices_by_module(groups).items() if all(part.axis == "in" for _, part in parts)]


def active_columns(layer: nn.Module, parts: Sequence[tuple[Slice, int]]) -> Tensor:
    """Which columns of a layer's weight, flattened to `(out, in * kernel)`, a size uses: `(columns,)`, integer.

    Args:
        layer: A linear map or an ungrouped convolution.
        parts: Its slices that are not at full width, each with the units kept.
    """
    weight = layer.weight
    numbers = torch.arange(weight[0].numel(), device=weight.device).view(1, *weight.shape[1:])
    return active_part(numbers, "weight", parts).flatten()


def columns_of(model: nn.Module, groups: Sequence[ChannelGroup], subnets: Sequence[Subnet], name: str) -> list[Tensor]:
    """For every size the columns of a reader that it uses."""
    layer = model.get_submodule(name)
    return [active_columns(layer, kept_by_module(groups, subnet.widths).get(name, ())) for subnet in subnets]


def patches(layer: nn.Module, input: Tensor, positions: Tensor | None = None) -> Tensor:
    """What a layer multiplies its weight with, a row per position: `(N * positions, in * kernel)`.

    Args:
        layer: A linear map or an ungrouped convolution, at any width.
        input: What it is called with, `(N, …, in)` or `(N, in, …)`.
        positions: Only these of each sample, `(N, P)`, numbered over all that are not N and channels; by default all.
    """
    if isinstance(layer, nn.Linear):
        return _chosen(input.unsqueeze(1) if input.ndim == 2 else input.flatten(1, -2), positions)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input = nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    spatial = input.ndim - 2
    axes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(axes):
        input = input.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    windows = input.movedim(1, 1 + spatial)  # (N, positions…, in, kernel…), a view
    if positions is not None:
        index = (_samples(positions), *torch.unravel_index(positions, windows.shape[1 : 1 + spatial]))
        windows = windows[index]
    return windows.flatten(-1 - spatial).flatten(0, -2)


def output_rows(layer: nn.Module, output: Tensor, positions: Tensor | None = None) -> Tensor:
    """What a layer returned, a row per position: `(N * positions, out)`; see `patches`."""
    rows = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    return _chosen(rows.unsqueeze(1) if rows.ndim == 2 else rows.flatten(1, -2), positions)


def _chosen(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Of `(N, positions, numbers)` the chosen positions, a row each."""
    return (rows if positions is None else rows[_samples(positions), positions]).flatten(0, 1)


def _samples(positions: Tensor) -> Tensor:
    return torch.arange(len(positions), device=positions.device)[:, None]


class _ReachedError(Exception):
    """All that is looked for in a forward has been seen."""


@contextmanager
def watched(model: nn.Module, seen: Mapping[str, Callable[[nn.Module, Tensor, Tensor], None]]) -> Iterator[None]:
    """Calls a function with the layer, its input and its output at each call of some layers while the context is open.

    Args:
        model: The denoiser.
        seen: For names of layers what is called; it may raise `_ReachedError`.
    """

    def hook_of(function: Callable[[nn.Module, Tensor, Tensor], None]) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            function(layer, args[0], output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(function)) for name, function in seen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until(forward: Callable[[], Any]) -> None:
    """Runs a forward; what watches it may stop it."""
    with suppress(_ReachedError):
        forward()


def stop() -> None:
    """Ends the forward that `run_until` runs."""
    raise _ReachedError


def count_calls(
    model: nn.Module, names: Sequence[str], forward: Callable[[], Any], devices: set[torch.device]
) -> dict[str, int]:
    """How often a forward calls each layer, in the order of their first calls; adds the devices that it does so on."""
    calls: dict[str, int] = {}

    def counter(name: str) -> Callable[[nn.Module, Tensor, Tensor], None]:
        def count(layer: nn.Module, input: Tensor, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            devices.add(input.device)

        return count

    with watched(model, {name: counter(name) for name in names}):
        forward()
    return calls


@contextmanager
def with_parameters(model: nn.Module, parameters: Mapping[str, Parameters]) -> Iterator[None]:
    """A block in which some layers have other weights and biases; those from before return."""
    layers = {name: model.get_submodule(name) for name in parameters}
    before = {name: parameters_of(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            set_parameters(layer, parameters[name])
        yield
    finally:
        for name, layer in layers.items():
            set_parameters(layer, before[name])


def parameters_of(layer: nn.Module) -> Parameters:
    """A layer's weight and bias, not copied."""
    return layer.weight.data, None if layer.bias is None else layer.bias.data


def set_parameters(layer: nn.Module, parameters: Parameters) -> None:
    """Gives a layer a weight and a bias, not copied."""
    weight, bias = parameters
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias

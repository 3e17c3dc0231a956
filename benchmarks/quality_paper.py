"""OFA-Diffusion (arXiv 2604.12668) as it is printed, for `quality.py` to compare with; the library has nothing of this.

Channels are ranked one by one (equation 4) and chosen freely, so that what GroupNorm is taken over changes with the
size; all layers of a resolution block share its channels out (equation 5, nothing of what the clip takes is given to
others); attention keeps head-dimension offsets in the order of their scores, in the basis that it was trained in, and
its softmax has the scale of the new head dimension; each step trains one size (equation 6, m = 3), on the data alone.

What is not as printed, so that models compare: sizes are shares of the parameters, met by the retention rate;
optimizer, learning rate over time, average of the weights, batch and steps are those of the other methods. Transformers
have the library's groups, those of the time embedding among them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate.utils import send_to_device
from diffusers import ModelMixin
from quality_data import BATCH_SIZE, DEVICE, Place, fit
from torch import Tensor, nn

from ofadiff import find_channel_groups, score_channels
from ofadiff.allocation.equation_5 import importance_shares, paper_widths
from ofadiff.channels import ChannelGroup, Slice, row_axis, slices_by_module
from ofadiff.data.order import fixed_batches
from ofadiff.noise.draws import Batch
from ofadiff.reweight import sample_size
from ofadiff.sizes import TOLERANCE
from ofadiff.training.losses import denoising_loss

P_0 = 0.25
M = 3.0
IMPORTANCE_SAMPLES = 1024
# Fewest channels in a group of a GroupNorm; one, which is all that it is normalised by then, where a size needs it.
CHANNELS_PER_NORM_GROUP = (2, 1)
LARGEST_P = 64.0

# Entries of every parameter that a size keeps, by its axes.
Indices = dict[str, dict[int, Tensor]]


def train_paper(place: Place, seed: int, steps: int) -> tuple[dict[float, nn.Module], dict[float, float]]:
    """Every size of a joint run as a small stock model of its own, and the retention rates P of the sizes.

    Args:
        place: The study.
        seed: Of the scores' samples, the sizes, images and noise.
        steps: Steps of the joint run; 0 only cuts.
    """
    model, scheduler = place.teacher(), place.scheduler()
    if place.study.kind.begin_training is not None:
        place.study.kind.begin_training(model)
    prepare = place.prepare(model, scheduler, training=True)
    data = place.data("training", model)
    groups = [by_channel(group) for group in find_channel_groups(model)]
    batches = fixed_batches(data, IMPORTANCE_SAMPLES, BATCH_SIZE, seed, "importance")
    loss_fn = functools.partial(denoising_loss, prepare=prepare)
    scores = score_channels(model, groups, (send_to_device(batch, DEVICE) for batch in batches), loss_fn)

    rates, students = {}, {}
    for size in place.study.sizes:
        rates[size], widths = widths_at(model, groups, scores, size)
        kept = {name: scores[name].argsort(descending=True)[:width].sort().values for name, width in widths.items()}
        students[size] = Student(model, groups, kept)

    def loss(step: int, batch: Batch) -> Tensor:
        size = sample_size(place.study.sizes, step, seed, "linear", m=M)
        return denoising_loss(students[size], batch, prepare)

    model.train()
    if steps:
        rate = {"steps": steps, "learning_rate": 5e-4, "seed": seed, "name": "Paper"}
        fit(list(model.parameters()), loss, data, **rate)
    return {size: student.alone().eval() for size, student in students.items()}, rates


def by_channel(group: ChannelGroup) -> ChannelGroup:
    """A group whose units are single channels, where they were GroupNorm's groups of them."""
    if group.kind != "convolution":
        return group
    slices = [replace(part, units=part.units * part.channels, channels=1) for part in group.slices]
    return replace(group, slices=tuple(slices))


def norm_groups(model: nn.Module, group: ChannelGroup) -> int:
    """How many groups the GroupNorm has that a group's channels pass; 1 without any."""
    modules = (model.get_submodule(part.module) for part in group.slices)
    return next((module.num_groups for module in modules if isinstance(module, nn.GroupNorm)), 1)


def widths_at(
    model: nn.Module, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], size: float
) -> tuple[float, dict[str, int]]:
    """The retention rate whose subnet comes closest to a size from below, and its widths.

    Raises:
        ValueError: If the size is below the smallest subnet.
    """
    full = sum(parameter.numel() for parameter in model.parameters())
    if size == 1:
        return 1.0, {group.name: group.width for group in groups}
    costs = unit_parameters(model, groups)
    norms = {group.name: norm_groups(model, group) for group in groups}

    def parameters(widths: Mapping[str, int]) -> int:
        return full - sum((group.width - widths[group.name]) * costs[group.name] for group in groups)

    def widths_of(P: float, channels: int) -> dict[str, int]:
        found = paper_widths(groups, scores, P, P_0)
        return {group.name: whole_step(found[group.name], norms[group.name], group.width, channels) for group in groups}

    for channels in CHANNELS_PER_NORM_GROUP:
        smallest = parameters(widths_of(0.0, channels)) / full
        if smallest <= size:
            break
    else:
        raise ValueError(f"size {size:g} is below the paper's smallest subnet, which has {smallest:.3f}")
    low, high = 0.0, LARGEST_P
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(widths_of(middle, channels)) <= size * full else (low, middle)
    shares = importance_shares(groups, scores, by_kind=False)
    return low, fill(widths_of(low, channels), groups, norms, shares, lambda widths: parameters(widths) / full - size)


def fill(
    widths: dict[str, int],
    groups: Sequence[ChannelGroup],
    steps: Mapping[str, int],
    shares: Mapping[str, float],
    missing: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """Takes further steps where the next step of P is too large a one, until the size is met or none fits.

    Args:
        widths: Widths at the largest P that does not exceed the size.
        groups: The channel groups.
        steps: By how much each of them grows.
        shares: Their shares of the importance, which say in which order P reaches them.
        missing: How far widths are above the size (negative: below it), as a share of the full model.
    """
    waiting = [group for group in groups if shares[group.name] > 0]
    for group in sorted(waiting, key=lambda each: (widths[each.name] + 1) / (shares[each.name] * each.width)):
        while missing(widths) < -TOLERANCE / 2 and widths[group.name] + steps[group.name] <= group.width:
            more = {**widths, group.name: widths[group.name] + steps[group.name]}
            if missing(more) > 0:
                break
            widths = more
    return widths


def whole_step(width: int, norm_groups: int, full: int, channels: int) -> int:
    """A width that GroupNorm's groups divide, with at least so many channels in each."""
    if norm_groups == 1:
        return max(1, width)
    return min(full, max(channels * norm_groups, round(width / norm_groups) * norm_groups))


def unit_parameters(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """Parameters that go with one unit of each group."""
    costs = {}
    for group in groups:
        costs[group.name] = 0
        for part in group.slices:
            for name, parameter in model.get_submodule(part.module).named_parameters(recurse=False):
                if part.axis == "in" and name != "weight":
                    continue
                axis = row_axis(parameter.shape) if part.axis == "out" else 1
                costs[group.name] += parameter.numel() // parameter.shape[axis] * part.repeats * part.channels
    return costs


def entries(length: int, parts: Sequence[tuple[str, Slice]], kept: Mapping[str, Tensor]) -> Tensor:
    """Entries of an axis that stay: those kept of every slice, and all that belongs to none."""
    found, position = [], 0
    for name, part in sorted(parts, key=lambda each: each[1].start):
        found += [torch.arange(position, part.start), part.start + part.indices(kept[name])]
        position = part.start + part.length
    return torch.cat([*found, torch.arange(position, length)])


def parameter_indices(model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor]) -> Indices:
    """What a size keeps of every parameter that it cuts, by name and axis."""
    indices: Indices = {}
    for module, parts in slices_by_module(groups).items():
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            axes = {}
            rows, columns = ([each for each in parts if each[1].axis == axis] for axis in ("out", "in"))
            if rows:
                axis = row_axis(parameter.shape)
                axes[axis] = entries(parameter.shape[axis], rows, kept)
            if columns and name == "weight":
                axes[1] = entries(parameter.shape[1], columns, kept)
            if axes:
                indices[f"{module}.{name}"] = {axis: index.to(DEVICE) for axis, index in axes.items()}
    return indices


class Student(nn.Module):
    """A size of the shared weights: gathers what it keeps of them in every forward, so that gradients reach them.

    Args:
        model: Holds the shared weights, at full width.
        groups: Its channel groups.
        kept: Units that the size keeps of each, in ascending order.
    """

    def __init__(self, model: ModelMixin, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        whole = all(len(kept[group.name]) == group.width for group in groups)
        # Not a submodule: its parameters are the shared model's, whoever uses them.
        self.shared = (model,)
        self.indices = {} if whole else parameter_indices(model, groups, kept)
        small = copy.deepcopy(model)
        for name, parameter in self.gathered().items():
            module, _, own = name.rpartition(".")
            setattr(small.get_submodule(module), own, nn.Parameter(parameter.detach().clone()))
        for group in groups:
            if group.resize is not None and len(kept[group.name]) < group.width:
                group.resize(small.get_submodule(group.block), group, len(kept[group.name]))
        self.skeleton = (small,)

    def gathered(self) -> dict[str, Tensor]:
        """Every parameter of the shared model as far as the size has it."""
        found = {}
        for name, parameter in self.shared[0].named_parameters():
            for axis, index in self.indices.get(name, {}).items():
                parameter = parameter.index_select(axis, index)
            found[name] = parameter
        return found

    def parameters(self, recurse: bool = True):
        """Those of the shared model."""
        return self.shared[0].parameters(recurse)

    def forward(self, *args, **kwargs):
        """As the stock model's."""
        if not self.indices:
            return self.shared[0](*args, **kwargs)
        return torch.func.functional_call(self.skeleton[0], self.gathered(), args, kwargs)

    @torch.no_grad()
    def alone(self) -> nn.Module:
        """The size as a stock model with weights of its own."""
        small = copy.deepcopy(self.skeleton[0])
        values = self.gathered()
        for name, parameter in small.named_parameters():
            parameter.copy_(values[name])
        return small

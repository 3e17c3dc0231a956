"""Least squares, layer by layer: the readers of cut branches give what the original's branches give.

In the order of the forward each reader (the second convolution of a residual block, the output projection of an
attention, the second layer of a feed-forward) gets the weights with which its cut input, as the model whose earlier
readers are corrected already makes it, comes closest to what the original's reader gives on the same samples. All sizes
share the solution: each of them reads a prefix of the same columns, so their normal equations add up.

Least squares for the layer after a cut are due to He et al. (2017, arXiv 1707.06168) and, for one model, Frantar and
Alistarh (2022, arXiv 2208.11580); nested sizes in one solution are what is new here.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ofadiff.adapters.size_adapter import SizeAdapter
from ofadiff.correction import readers
from ofadiff.correction.equations import NormalEquations, Reduce, SplitEquations
from ofadiff.cutting import set_widths
from ofadiff.layers import LowRankUpdate
from ofadiff.reading.arguments import check_argument, check_number, check_seed, check_whole, is_loader
from ofadiff.reading.numbers import is_number
from ofadiff.supernet import Supernet

Forward = Callable[[nn.Module, Any], Any]

# How much more the largest size counts than each of the others; and where the others have something of their own, so
# that shared weights may stay close to the original's.
LARGEST_WEIGHT, LARGEST_WEIGHT_BESIDE_ADAPTERS = 10.0, 300.0

# In how many goes all readers are fitted, and how much memory the sums of a go may take, if those of one reader do not.
MOST_WAVES, MOST_BYTES = 24, 4 * 2**30

# One of so many samples is for the choice of the ridge.
UNSEEN_EVERY = 4


@dataclass(frozen=True)
class _Correction:
    """What is asked for, see `correct_readers`, and what is known on the way.

    Attributes:
        calls: For every batch how often its forward calls each reader, in the order of the first calls.
        originals: Weights and biases of the readers that are corrected already, as they were.
        devices: Where readers were called.
    """

    supernet: Supernet
    batches: Iterable[Any]
    loss_fn: Forward
    weights: Mapping[float, float]
    max_positions: int
    seed: int
    share: tuple[int, int]
    calls: list[dict[str, int]] = field(default_factory=list)
    originals: dict[str, readers.Parameters] = field(default_factory=dict)
    devices: set[torch.device] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the model computes; its weights may stay elsewhere."""
        return next(iter(self.devices), self.supernet.model.device)

    def forwards(self) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Every batch by its number: what calls the model on it, each time with the same random numbers."""
        for number, batch in enumerate(self.batches):
            yield number, functools.partial(self._forward, number, batch)

    def _forward(self, number: int, batch: Any) -> None:
        model = self.supernet.model
        kind = self.device.type
        devices = [] if kind == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(self.seed + number)
            self.loss_fn(model, batch)

    def count_calls(self) -> list[str]:
        """Fills `calls`; the readers in the order of the forward."""
        names = readers.find_readers(self.supernet.groups)
        for _, forward in self.forwards():
            with _at_full_width(self):
                self.calls.append(readers.count_calls(self.supernet.model, names, forward, self.devices))
        if not self.calls:
            raise ValueError("there is no batch to correct the readers on")
        return list(dict.fromkeys(name for calls in self.calls for name in calls))


@torch.no_grad()
def correct_readers(
    supernet: Supernet,
    batches: Iterable[Any],
    loss_fn: Forward,
    weights: Mapping[float, float] | None = None,
    ridge: float | None = None,
    adapter_rank: int = 0,
    readers_at_once: int | None = None,
    max_positions: int = 64,
    seed: int = 0,
    reduce: Reduce | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> dict[str, float]:
    """Fits the readers of a supernet, in place, so that every size's branches give what the original's give.

    For a supernet that has not been trained: it learns from what it computes itself at full width. Takes no gradients.
    Each reader needs a part of a forward per batch and size, and of one at full width.

    Args:
        supernet: As `Supernet(...)` made it.
        batches: What `loss_fn` takes; read again for every reader, so a list or a loader. Some hundred noisy samples,
            their noise drawn over all timesteps.
        loss_fn: Calls the model on a batch, `loss_fn(model, batch)`, as that of `score_channels`; what it returns does
            not matter.
        weights: What a size counts; sizes that are not named count 1, the largest 10, or 300 with adapters.
        ridge: Pull towards the weights as they are, as a share of the mean square of what the reader reads. By
            default the one of 1e-4, 1e-3, …, 1 that serves a quarter of the samples best when it is solved on the
            others; where none serves them, because there are few samples, the reader stays as it is.
        adapter_rank: Rank of the LoRA that each size gets on every reader for what it needs beyond the shared
            solution, kept as the size's own adapter (`Supernet.size_adapters`); 0 for none.
        readers_at_once: So many readers, one after the other in the forward, are fitted to what the model makes before
            any of them is corrected: so many times fewer forwards. By default as many as it takes to fit all readers in
            24 goes, fewer where their sums would take more than 4 GiB.
        max_positions: At most so many positions of each sample (pixels, tokens) are looked at, a random choice.
        seed: Of that choice, and of random numbers that `loss_fn` draws.
        reduce: Adds up a tensor over all processes where each has its share of the samples, such as
            `accelerator.reduce`.
        share: Which one that is: (0, 4) has every fourth sample, from the first one on. All of them then give what one
            process with all samples gives.
        progress: Show a bar.

    Returns:
        For every reader the share of its weighted squared error that is left.

    Raises:
        ValueError: If a number is out of its range, a size is unknown, there is no batch, batches cannot be read twice,
            a size has an adapter, or what a reader reads or gives is not finite.

    Example:
        >>> supernet = Supernet(unet, groups, scores, subnets)
        >>> left = correct_readers(supernet, batches, loss_fn)
        >>> supernet.save_pretrained("corrected")
    """
    weights = {} if weights is None else weights
    check_arguments(supernet, batches, loss_fn, weights, ridge, adapter_rank, readers_at_once, max_positions)
    check_seed("seed", seed)
    if reduce is not None:
        check_argument("reduce", reduce, callable(reduce), "a function of a tensor, or None")
    split = isinstance(share, tuple) and len(share) == 2 and all(isinstance(each, Integral) for each in share)
    check_argument("share", share, split and 0 <= share[0] < share[1], "two whole numbers, such as (0, 4)")
    model = supernet.model
    largest = LARGEST_WEIGHT_BESIDE_ADAPTERS if adapter_rank else LARGEST_WEIGHT
    counted = dict.fromkeys(supernet.sizes, 1.0) | {supernet.sizes[-1]: largest}
    counted |= {supernet.subnets.find(each).size: weight for each, weight in weights.items()}
    work = _Correction(supernet, batches, loss_fn, counted, max_positions, seed, share)
    was_training, size = model.training, supernet.size
    with supernet.used_at(None):
        model.eval()
        try:
            waves = _waves(work, work.count_calls(), readers_at_once, adapter_rank > 0)
            left = _correct_waves(work, tqdm(waves, "Correction", disable=not progress), ridge, adapter_rank, reduce)
        except BaseException:
            _undo(work)
            raise
        finally:
            supernet.set_size(size)
            model.train(was_training)
    return left


def check_arguments(
    supernet: Supernet,
    batches: Iterable[Any],
    loss_fn: Forward,
    weights: Mapping[float, float],
    ridge: float | None,
    adapter_rank: int,
    readers_at_once: int | None,
    max_positions: int,
) -> None:
    """Raises ValueError if something cannot work; see `correct_readers`."""
    check_argument("supernet", supernet, isinstance(supernet, Supernet), "a Supernet")
    check_argument("loss_fn", loss_fn, callable(loss_fn), "a function of a model and a batch")
    check_argument("batches", batches, is_loader(batches), "a list or a loader of what loss_fn takes")
    check_argument("weights", weights, isinstance(weights, Mapping), "a dict of numbers by sizes, or None")
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be read only once; the correction reads the same "
            "batches for every reader: give a list or a loader"
        )
    for size, weight in weights.items():
        supernet.subnets.find(size)
        check_number(f"weights[{size}]", weight, 0, words="a number of at least 0")
    if ridge is not None:
        check_argument("ridge", ridge, is_number(ridge) and ridge > 0, "a number above 0, or None")
    check_whole("adapter_rank", adapter_rank, 0)
    if readers_at_once is not None:
        check_whole("readers_at_once", readers_at_once, 1)
    check_whole("max_positions", max_positions, 1)
    if supernet.size_adapters:
        sizes = ", ".join(f"{size:g}" for size in supernet.size_adapters)
        raise ValueError(f"size {sizes} has an adapter already; the correction is for a supernet that is not trained")


def _waves(work: _Correction, names: Sequence[str], at_once: int | None, each: bool) -> list[list[str]]:
    """The readers of each go."""
    most = at_once or math.ceil(len(names) / MOST_WAVES)
    waves: list[list[str]] = []
    taken = 0
    supernet = work.supernet
    for name in names:
        columns = readers.columns_of(supernet.model, supernet.groups, list(supernet.subnets), name)
        width = supernet.model.get_submodule(name).weight[0].numel()
        needed = 2 * 8 * (width**2 + each * sum(len(own) ** 2 for own in columns))
        if not waves or len(waves[-1]) == most or (at_once is None and taken + needed > MOST_BYTES):
            waves.append([])
            taken = 0
        waves[-1].append(name)
        taken += needed
    return waves


def _correct_waves(
    work: _Correction, waves: Iterable[Sequence[str]], ridge: float | None, rank: int, reduce: Reduce | None
) -> dict[str, float]:
    """Corrects some readers after the other; returns the share of each one's error that is left."""
    left: dict[str, float] = {}
    updates: dict[float, dict[str, LowRankUpdate]] = {size: {} for size in work.supernet.sizes}
    for wave in waves:
        equations = _measure(work, wave, each=rank > 0)
        for name in wave:
            own = equations.pop(name)
            if reduce is not None:
                own.reduce(reduce)
            left[name], found = _correct(work, name, own, ridge, rank)
            for size, update in found.items():
                updates[size][name] = update
        if rank:
            _give_adapters(work.supernet, updates, rank)
    return left


def _undo(work: _Correction) -> None:
    """Gives the supernet the weights back that it came with."""
    for name, parameters in work.originals.items():
        readers.set_parameters(work.supernet.model.get_submodule(name), parameters)
    for size in list(work.supernet.size_adapters):
        work.supernet.set_size_adapter(size, None)


@contextmanager
def _at_full_width(work: _Correction) -> Iterator[None]:
    """The original: all units of all groups, and readers as they were."""
    supernet = work.supernet
    set_widths(supernet.model, supernet.groups, {group.name: group.width for group in supernet.groups})
    for name in work.originals:
        supernet.model.get_submodule(name).updates = ()
    with readers.with_parameters(supernet.model, work.originals):
        yield


def _measure(work: _Correction, wave: Sequence[str], each: bool) -> dict[str, SplitEquations]:
    """The normal equations of some readers, over all batches and sizes."""
    supernet = work.supernet
    model, subnets = supernet.model, list(supernet.subnets)
    equations = {}
    for name in wave:
        layer = model.get_submodule(name)
        columns = [own.to(work.device) for own in readers.columns_of(model, supernet.groups, subnets, name)]
        shape = layer.weight[0].numel(), len(layer.weight), layer.bias is not None
        equations[name] = SplitEquations(*(NormalEquations(columns, *shape, each) for _ in range(2)))
    seen = dict.fromkeys(wave, 0)
    for number, forward in work.forwards():
        targets = _Targets(work, wave, number, seen)
        with _at_full_width(work), readers.watched(model, targets.keepers()):
            readers.run_until(forward)
        for index, subnet in enumerate(subnets):
            weight = work.weights[subnet.size]
            if not weight and not each:
                continue
            supernet.set_size(subnet.size)
            with readers.watched(model, targets.comparers(equations, index, weight)):
                readers.run_until(forward)
    return equations


class _Targets:
    """What the original's readers give for one batch, and what sizes lack of it.

    Args:
        work: What is asked for.
        wave: The readers.
        number: Of the batch.
        seen: Samples that each reader was called with in the batches before; counted on.
    """

    def __init__(self, work: _Correction, wave: Sequence[str], number: int, seen: dict[str, int]) -> None:
        self.work, self.wave, self.number, self.seen = work, wave, number, seen
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in wave}
        self.positions: dict[str, list[Tensor | None]] = {name: [] for name in wave}
        self.samples: dict[str, list[int]] = {}

    def keepers(self) -> dict[str, Callable[[nn.Module, Tensor, Tensor], None]]:
        """What keeps outputs, to be called by the original's readers."""
        return {name: functools.partial(self._keep, name) for name in self.wave}

    def _keep(self, name: str, layer: nn.Module, input: Tensor, output: Tensor) -> None:
        if name not in self.samples:
            index, count = self.work.share
            self.samples[name] = [(self.seen[name] + each) * count + index for each in range(len(output))]
            self.seen[name] += len(output)
        call, channels = len(self.outputs[name]), output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1]
        positions = output.numel() // (len(output) * channels)
        chosen = None
        if positions > self.work.max_positions:
            chosen = torch.stack([self._draw(f"{name} {call} {each}", positions) for each in self.samples[name]])
            chosen = chosen.to(output.device)
        self.positions[name].append(chosen)
        self.outputs[name].append(readers.output_rows(layer, output, chosen))
        self._stop_after(name, len(self.outputs[name]))

    def _draw(self, what: str, positions: int) -> Tensor:
        """Positions of one sample, the same ones whichever process and batch it is in."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.work.seed} {what}").getrandbits(63))
        return torch.randperm(positions, generator=generator)[: self.work.max_positions]

    def comparers(
        self, equations: Mapping[str, SplitEquations], size: int, weight: float
    ) -> dict[str, Callable[[nn.Module, Tensor, Tensor], None]]:
        """What adds to the normal equations, to be called by the readers at a size."""
        seen = dict.fromkeys(self.wave, 0)

        def compare(name: str, layer: nn.Module, input: Tensor, output: Tensor) -> None:
            call = seen[name]
            seen[name] += 1
            chosen = self.positions[name][call]
            rows = readers.patches(layer, input, chosen)
            target, given = self.outputs[name][call], readers.output_rows(layer, output, chosen)
            if not all(torch.isfinite(values).all() for values in (rows, target, given)):
                raise ValueError(f"{name} reads or gives values that are not finite; correct in float32 or bfloat16")
            unseen = self._unseen(name, len(rows))
            equations[name].seen.add(size, rows[~unseen], target[~unseen], given[~unseen], weight)
            equations[name].unseen.add(size, rows[unseen], target[unseen], given[unseen], weight)
            self._stop_after(name, seen[name])

        return {name: functools.partial(compare, name) for name in self.wave}

    def _unseen(self, name: str, rows: int) -> Tensor:
        """Which rows are of samples that choose the ridge."""
        chosen = torch.tensor([number % UNSEEN_EVERY == 1 for number in self.samples[name]])
        return chosen.repeat_interleave(rows // len(chosen))

    def _stop_after(self, name: str, calls: int) -> None:
        if name == self.wave[-1] and calls == self.work.calls[self.number].get(name):
            readers.stop()


def _correct(
    work: _Correction, name: str, split: SplitEquations, ridge: float | None, rank: int
) -> tuple[float, dict[float, LowRankUpdate]]:
    """Gives one reader its solution; returns the share of the error that is left, and the updates of single sizes."""
    layer = work.supernet.model.get_submodule(name)
    change, equations = split.solve(ridge)
    if not torch.isfinite(change).all():
        raise ValueError(f"the correction of {name} is not finite; correct in float32, or with a larger ridge")
    left = equations.error_left(change)
    weight, bias = readers.parameters_of(layer)
    work.originals[name] = weight.clone(), None if bias is None else bias.clone()
    weight += change[: equations.width].T.reshape(weight.shape).to(weight)
    if bias is not None:
        bias += change[-1].to(bias)
    updates = {}
    if rank:
        for index, size in enumerate(work.supernet.sizes):
            if not equations.uses(index):
                continue  # the size drops the branch
            found = split.low_rank(index, change, rank, ridge)
            if found is None:
                continue
            up, down = found
            kernel = weight.shape[2:]
            down = down.reshape(len(down), -1, *kernel).to(weight.dtype)
            up = up.reshape(*up.shape, *(1 for _ in kernel)).to(weight.dtype)
            updates[size] = LowRankUpdate(down.contiguous(), up.contiguous(), 1.0)
    return left, updates


def _give_adapters(supernet: Supernet, updates: Mapping[float, Mapping[str, LowRankUpdate]], rank: int) -> None:
    """Gives sizes the LoRAs that have been found so far."""
    for size, own in updates.items():
        if not own:
            continue
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(own),
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": True,
            "bias": "none",
        }
        supernet.set_size_adapter(size, SizeAdapter(config, dict(own)))

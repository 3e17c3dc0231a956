"""Guidance with a small size: the unconditional half at a size of its own, or the small size as the bad model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ofadiff.diffusers_hooks import are_cached, is_deep_cached
from ofadiff.pipelines.guidance_table import HALVES, Halves
from ofadiff.pipelines.halves import Arguments, are_twins, combined, halves_of, in_halves, same, shapes, together
from ofadiff.pipelines.steps import step_reader
from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number
from ofadiff.recordings.recorded_call import parameters_of
from ofadiff.size_schedule import SizeSchedule
from ofadiff.supernet import Supernet

# How the calls of a denoiser can be split, as was tried: by the make-up of its modules and the shapes of the arguments.
WAYS: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()

# Arguments of pipelines that switch classifier-free guidance on; the first that a call takes counts.
SCALES = ("true_cfg_scale", "guidance_scale")


class GuidedCalls(ABC):
    """What a denoiser does, in a pipeline's call with `guidance_size=`, in place of one forward.

    Args:
        supernet: The denoiser.
        name: What the pipeline calls it.
        size: Size of the conditional half; None is the one that is set, which a callback may change.
        guidance_size: Size of the unconditional one.
        read: What tells the step of a call, where one of the sizes is a schedule.
    """

    def __init__(
        self,
        supernet: Supernet,
        name: str,
        size: SizeSchedule | None,
        guidance_size: SizeSchedule,
        read: Callable[[tuple, dict[str, Any]], tuple[int, int]] | None,
    ) -> None:
        self.supernet, self.name = supernet, name
        self.size, self.guidance_size, self.read = size, guidance_size, read
        self.latents_name = parameters_of(supernet.model)[0]

    def __call__(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What one call of the denoiser gives, which is left at its own size; `call` is a forward."""
        arguments = args, kwargs
        step, steps = (0, 1) if self.read is None else self.read(*arguments)
        size = self.supernet.size if self.size is None else self.size.at(step, steps)
        try:
            return self.answer(call, arguments, size, self.guidance_size.at(step, steps))
        finally:
            if self.supernet.size != size:
                self.supernet.set_size(size)

    @abstractmethod
    def answer(self, call: Callable[..., Any], arguments: Arguments, size: float, guidance_size: float) -> Any:
        """The same, at the sizes of its step."""

    def latents(self, arguments: Arguments) -> Any:
        """The first argument of a denoiser: a tensor `(N, …)`, or a list of N."""
        return arguments[0][0] if arguments[0] else arguments[1][self.latents_name]

    def at(self, size: float, call: Callable[..., Any], arguments: Arguments) -> Any:
        """What the denoiser puts out at a size."""
        if self.supernet.size != size:
            self.supernet.set_size(size)
        return call(*arguments[0], **arguments[1])

    def finish(self) -> None:  # noqa: B027 - most have nothing to say
        """Raises ValueError, at the end of a pipeline's call, if there was no guidance."""


class HalvesOfBatches(GuidedCalls):
    """Both halves of guidance come in one batch: each is a forward of its own."""

    unconditional_first = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._make_up = make_up(self.supernet.model)
        self._ways = WAYS.setdefault(self.supernet.model, {})
        self._rows = 0  # of a batch of both halves

    def answer(self, call: Callable[..., Any], arguments: Arguments, size: float, guidance_size: float) -> Any:
        latents = self.latents(arguments)
        if self._rows == 2 * len(latents):  # the pipeline guides some steps only: this is the conditional half alone
            return self.at(size, call, arguments)
        if not are_twins(latents):
            raise ValueError(
                f"guidance_size is given, but the {self.name} is called with {len(latents)} samples that are not twice "
                "the same latents, as classifier-free guidance has them; guidance_scale must be above 1"
            )
        self._rows = len(latents)
        if size == guidance_size:
            return self.at(size, call, arguments)
        multiples = self._way(call, arguments, size, len(latents))
        order = (guidance_size, size) if self.unconditional_first else (size, guidance_size)
        halves = halves_of(arguments, len(latents), multiples)
        return together(*[self.at(each, call, half) for each, half in zip(order, halves, strict=True)])

    def _way(self, call: Callable[..., Any], arguments: Arguments, size: float, rows: int) -> bool:
        kind = self._make_up, shapes(arguments)
        if kind not in self._ways:
            way = self.at(size, lambda *args, **kwargs: in_halves(call, (args, kwargs), rows), arguments)
            if way is None:
                raise ValueError(
                    f"guidance_size is given, but the {self.name} does not answer to halves of its batch what it "
                    "answers to the whole: it mixes samples, or has arguments that cannot be split"
                )
            self._ways[kind] = way
        return self._ways[kind]


def make_up(model: nn.Module) -> tuple[tuple[type, type], ...]:
    """Of a denoiser, what decides whether it mixes samples of a batch: the classes of its modules and processors."""
    return tuple((type(module), type(vars(module).get("processor"))) for module in model.modules())


class SecondHalvesOfBatches(HalvesOfBatches):
    """As `HalvesOfBatches`, the conditional half first."""

    unconditional_first = False


class CallsInTurn(GuidedCalls):
    """The halves of guidance come in calls of their own: the second with the same latents is the unconditional one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first: Any = None
        self._calls = self._pairs = 0

    def answer(self, call: Callable[..., Any], arguments: Arguments, size: float, guidance_size: float) -> Any:
        latents = self.latents(arguments)
        self._calls += 1
        if self._first is not None and same(self._first, latents):
            self._first, self._pairs = None, self._pairs + 1
            return self.at(guidance_size, call, arguments)
        if self._calls > 1:
            self.finish()
        self._first = latents
        return self.at(size, call, arguments)

    def finish(self) -> None:
        if self._calls and not self._pairs:
            raise ValueError(
                f"guidance_size is given, but the {self.name} is called once for its latents, not twice, as "
                "classifier-free guidance does; its scale must be above 1, and a negative prompt given where the "
                "pipeline has none of its own"
            )


class Autoguidance(GuidedCalls):
    """Every call is answered by D + (w - 1) (D - D_bad), with D_bad the denoiser at `guidance_size`.

    Autoguidance of "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507). Each kind of output
    that models have, noise, velocity or image, is linear in D at given latents, so it is guided as it is.
    """

    def __init__(self, scale: float, *args: Any) -> None:
        super().__init__(*args)
        self.scale = scale

    def answer(self, call: Callable[..., Any], arguments: Arguments, size: float, guidance_size: float) -> Any:
        if size == guidance_size:
            return self.at(size, call, arguments)
        bad = self.at(guidance_size, call, arguments)
        good = self.at(size, call, arguments)
        return combined(lambda one, other: self._guided(one, other, self.latents(arguments)), bad, good)

    def _guided(self, bad: Any, good: Any, latents: Any) -> Any:
        if isinstance(good, list):
            return [self._guided(*pair) for pair in zip(bad, good, latents, strict=True)]
        guided = good + (self.scale - 1) * (good - bad)
        if not (isinstance(latents, Tensor) and good.ndim == latents.ndim > 2):
            return guided
        channels = latents.shape[1]
        # The second half may be a learned variance, which is not guided.
        return torch.cat([guided[:, :channels], good[:, channels:]], dim=1) if good.shape[1] == 2 * channels else guided


KINDS: Mapping[Halves, type[GuidedCalls]] = {
    Halves.UNCONDITIONAL_FIRST: HalvesOfBatches,
    Halves.CONDITIONAL_FIRST: SecondHalvesOfBatches,
    Halves.CONDITIONAL_CALL_FIRST: CallsInTurn,
}


def check_guidance(pipeline_class: type, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raises ValueError if a small size cannot guide a pipeline's call.

    Args:
        pipeline_class: The stock class of the pipeline.
        parameters: Of its call.
        given: What it is called with, by name.
    """
    scale, name = given.get("autoguidance_scale"), pipeline_class.__name__
    own = next((each for each in SCALES if each in parameters), None)
    own_scale = None if own is None else given.get(own, parameters[own].default)
    if scale is None:
        if name not in HALVES:
            raise ValueError(
                f"guidance_size is given, but which half of a {name}'s guidance is the unconditional one is not known; "
                "ofadiff.pipelines.guidance_table.HALVES must have an entry for it that says so, or give "
                "autoguidance_scale, which needs no halves"
            )
        if is_number(own_scale) and own_scale <= 1:
            raise ValueError(f"guidance_size is given, but {own} is {own_scale:g}; it must be above 1")
        return
    if given.get("guidance_size") is None:
        raise ValueError("autoguidance_scale is given, but no guidance_size, which says what the bad model is")
    if not (is_number(scale) and scale >= 1):
        raise ValueError(f"autoguidance_scale is {shown(scale)}; it must be a number from 1 on")
    if name in HALVES and own not in given and is_number(own_scale) and own_scale > 1:
        raise ValueError(
            f"autoguidance_scale is given, and a {name}'s own {own} is {own_scale} by default: say "
            f"{own} as well; with 1.0 there is no unconditional half, above it both kinds of guidance act"
        )


@contextmanager
def guided(
    pipeline: Any,
    denoisers: Mapping[str, nn.Module],
    size: SizeSchedule | None,
    guidance_size: SizeSchedule,
    autoguidance_scale: float | None = None,
) -> Iterator[None]:
    """A block in which a pipeline's denoisers answer with guidance of a size of its own.

    Args:
        pipeline: Of a class in `HALVES`, unless `autoguidance_scale` is given.
        denoisers: Its components that are supernets, as it calls them.
        size: Of the conditional half, over the steps; None is the size that is set.
        guidance_size: Of the unconditional half, or of the bad model.
        autoguidance_scale: w of autoguidance; by default the halves of classifier-free guidance are told apart.

    Raises:
        ValueError: If a denoiser was replaced by what `torch.compile` returns, caches earlier steps, or a schedule
            cannot be followed; in a forward, and at the end of the block, if there is no classifier-free guidance.
    """
    steady = len({*(size or guidance_size)}) == len({*guidance_size}) == 1
    with ExitStack() as stack:
        kinds: list[GuidedCalls] = []
        for name, denoiser in denoisers.items():
            if isinstance(denoiser, OptimizedModule):
                raise ValueError(
                    f"guidance_size cannot tell the halves of what torch.compile returned; compile the {name} in "
                    f"place, pipeline.{name}.compile()"
                )
            supernet = Supernet.of(denoiser)
            if is_deep_cached(supernet.model):
                raise ValueError(
                    f"the {name} has DeepCache, which would give one half of guidance the other one's features; call "
                    "its helper's disable()"
                )
            if are_cached(supernet.model.modules()):
                raise ValueError(
                    f"the {name} has a cache of earlier steps, and with guidance_size no two forwards in a row are of "
                    f"one size, so there is nothing to reuse; call pipeline.{name}.disable_cache()"
                )
            told = supernet, name, size, guidance_size, None if steady else step_reader(pipeline, name)
            if autoguidance_scale is not None:
                kinds.append(Autoguidance(autoguidance_scale, *told))
            else:
                kinds.append(KINDS[HALVES[pipeline._stock_class.__name__]](*told))
            stack.enter_context(supernet.answering(kinds[-1]))
        yield
        for kind in kinds:
            kind.finish()

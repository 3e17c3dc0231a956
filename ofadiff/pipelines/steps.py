"""Which denoising step a call of a denoiser belongs to, and the size that a schedule has there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor, nn

from ofadiff.diffusers_hooks import is_deep_cached
from ofadiff.recordings.recorded_call import parameters_of, time_argument
from ofadiff.size_schedule import SizeSchedule
from ofadiff.supernet import Supernet
from ofadiff.supernet_model import unwrapped

# What a pipeline makes of its scheduler's timesteps for the denoiser; N are those that it was trained with.
Convention = Callable[[Tensor, float], Tensor]


def as_they_are(timesteps: Tensor, trained: float) -> Tensor:
    """t."""
    return timesteps


def as_share(timesteps: Tensor, trained: float) -> Tensor:
    """t / N, as many flow matching models take it."""
    return timesteps / trained


def as_share_of_the_way(timesteps: Tensor, trained: float) -> Tensor:
    """1 - t / N."""
    return 1 - timesteps / trained


def as_way(timesteps: Tensor, trained: float) -> Tensor:
    """N - t."""
    return trained - timesteps


# Denoisers whose time rises towards the image.
WITH_RISING_TIME = {
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "ZImageTransformer2DModel",
}

# Their denoisers may be given a share instead of a timestep; so may those of others that can sample flows.
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)

# How far a timestep and what the denoiser is given may be apart, as a share of it: bfloat16 has eight bits.
ROUNDING = 2**-7


def moment_of(timestep: Any) -> float:
    """A denoiser's timestep as one number: of several, the one that most samples or tokens have."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    return float(timestep.detach().flatten().float().mode().values)


def distinct(timesteps: Tensor) -> Tensor:
    """Timesteps without those that repeat the one before: second-order schedulers visit them twice."""
    return torch.unique_consecutive(timesteps.detach().flatten().cpu())


def conventions_of(scheduler: Any, denoiser: Any) -> tuple[Convention, ...]:
    """What a denoiser may be given for the timesteps of a scheduler."""
    if type(denoiser).__name__ in WITH_RISING_TIME:
        return as_share_of_the_way, as_way
    flows = isinstance(scheduler, FLOW_SCHEDULERS) or scheduler.config.get("use_flow_sigmas", False)
    return (as_they_are, as_share) if flows else (as_they_are,)


def step_of(
    moment: float, timesteps: Tensor, trained: float, conventions: Sequence[Convention]
) -> tuple[int, tuple[Convention, ...]] | None:
    """The place, among a scheduler's timesteps, of what a denoiser was called with.

    Args:
        moment: The denoiser's timestep.
        timesteps: The scheduler's, without repetitions, in the order in which they are sampled, `(steps,)`.
        trained: Timesteps that it was trained with.
        conventions: What the denoiser may be given for them; where two fit, as at the time 1, the earlier step counts:
            the first call of a denoiser tells its convention, and is at the beginning.

    Returns:
        The step, from 0 on, and the conventions that fit; None if the denoiser's timestep is none of them.
    """
    found: dict[Convention, int] = {}
    for convention in conventions:
        expected = convention(timesteps.double(), trained)
        apart = (expected - moment).abs()
        nearest = int(apart.argmin())
        if apart[nearest] <= ROUNDING * max(abs(float(expected[nearest])), ROUNDING):
            found[convention] = nearest
    return (min(found.values()), tuple(found)) if found else None


def step_reader(pipeline: Any, name: str) -> Callable[[tuple, dict[str, Any]], tuple[int, int]]:
    """What tells, of the arguments of each call of a pipeline's denoiser, its step, from 0 on, and how many there are.

    Args:
        pipeline: With a `scheduler`.
        name: What it calls the denoiser.

    Raises:
        ValueError: As `following`.
    """
    if pipeline.components.get("scheduler") is None:
        raise ValueError(
            f"a SizeSchedule needs steps, and this {type(pipeline).__name__} has no scheduler, which says what they are"
        )
    model: Any = unwrapped(pipeline.components[name])
    parameters = parameters_of(model)
    time = time_argument(parameters)
    if time is None:
        raise ValueError(f"a SizeSchedule needs steps, and the {name} takes no timestep that says which one it is in")
    timesteps: Tensor | None = None
    steps = torch.empty(0)
    conventions: tuple[Convention, ...] = ()

    def read(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        nonlocal timesteps, steps, conventions
        scheduler = pipeline.scheduler
        if scheduler.timesteps is not timesteps:  # the first forward, or that of another stage
            timesteps, steps = scheduler.timesteps, distinct(scheduler.timesteps)
            conventions = conventions_of(scheduler, model)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}.get(time)
        moment = math.nan if given is None else moment_of(given)
        found = step_of(moment, steps, scheduler.config.get("num_train_timesteps", math.nan), conventions)
        if found is None:
            raise ValueError(
                f"the {name} is called at {time} {moment:g}, which is none of the {type(scheduler).__name__}'s "
                "timesteps, so a SizeSchedule does not say its size; give one size"
            )
        step, conventions = found
        return step, len(steps)

    return read


@contextmanager
def following(pipeline: Any, denoisers: Mapping[str, nn.Module], schedule: SizeSchedule) -> Iterator[None]:
    """A block in which every forward of a pipeline's denoisers runs at the size that a schedule has at its step.

    Args:
        pipeline: With a `scheduler`, whose timesteps are the steps.
        denoisers: Its components that are supernets, as it calls them.
        schedule: Of sizes that they all have.

    Raises:
        ValueError: If the pipeline has no scheduler, or a denoiser has no timestep or is to change its size under
            DeepCache; in a forward, if its timestep is none of the scheduler's.
    """
    handles = []
    try:
        for name, denoiser in denoisers.items():
            supernet = Supernet.of(denoiser)
            if is_deep_cached(supernet.model) and len({*schedule}) > 1:
                raise ValueError(
                    f"the {name} has DeepCache, which would mix the features of one size into another's steps; give "
                    "one size, or call its helper's disable()"
                )
            follower = _follower(step_reader(pipeline, name), supernet, schedule)
            handles.append(denoiser.register_forward_pre_hook(follower, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _follower(
    read: Callable[[tuple, dict[str, Any]], tuple[int, int]], supernet: Supernet, schedule: SizeSchedule
) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """Sets a supernet's size before each of its forwards, but those of calls inside of this one, as in callbacks."""
    user = supernet.user

    def follow(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if supernet.user is not user:
            return
        step, steps = read(args, kwargs)
        size = schedule.at(step, steps)
        if supernet.size != size:
            supernet.set_size(size)

    return follow

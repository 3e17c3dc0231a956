"""What is hooked on a denoiser's modules: caches of earlier steps, and what moves or casts weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.hooks.group_offloading import GroupOffloadingHook
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import nn

# States that count the steps of a sampling, with what they hold of the step before: that is forgotten, the count stays.
COUNTING = {"MagCacheState": "previous_residual"}


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that diffusers has put in place of a module's forward."""
    registry = vars(module).get("_diffusers_hook")  # diffusers gives a module this with its first hook
    return () if registry is None else tuple(registry.hooks.values())


def moves_weights(module: nn.Module) -> bool:
    """Whether a module's weights are elsewhere, or in another dtype, between its forwards."""
    return any(isinstance(hook, (GroupOffloadingHook, LayerwiseCastingHook)) for hook in hooks_of(module))


def are_cached(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook on any module remembers earlier steps."""
    return any(hook._is_stateful for module in modules for hook in hooks_of(module))


def is_deep_cached(model: nn.Module) -> bool:
    """Whether the package DeepCache has put its forward in place of a denoiser's; what it holds cannot be emptied."""
    return "forward" in vars(model) and model.forward.__module__.partition(".")[0] == "DeepCache"


def empty_caches(modules: Iterable[nn.Module]) -> None:
    """Makes caches, of `enable_cache` or of diffusers' `apply_` functions, forget what earlier steps computed.

    The next step computes in full, as the first one of a sampling does; which half of guidance it is stays known.
    """
    for module in modules:
        for hook in hooks_of(module):
            if hook._is_stateful:
                _empty(hook, module)


def _empty(hook: Any, module: nn.Module) -> None:
    managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
    states = [state for manager in managers for state in manager._state_cache.values()]
    if any(type(state).__name__ in COUNTING for state in states):
        for state in states:
            setattr(state, COUNTING[type(state).__name__], None)
        return
    # A reset forgets the context too, which the pipeline has set around the forward.
    contexts = [{name: value for name, value in vars(manager).items() if "context" in name} for manager in managers]
    hook.reset_state(module)
    if type(hook).__name__ == "FasterCacheBlockHook":
        hook.state.iteration = hook.block_skip_range  # it computes then; at 0 it takes an earlier step to be there
    for manager, context in zip(managers, contexts, strict=True):
        vars(manager).update(context)

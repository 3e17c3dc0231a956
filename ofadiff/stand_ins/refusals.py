"""Methods that a diffusers class has and that cannot be right on what ofadiff made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


def refusals(
    stock: type, reasons: Mapping[str, str], unless: Callable[[Any], bool] = lambda model: False
) -> dict[str, Callable[..., Any]]:
    """For a class derived from a stock class: of these methods those that it has, each raising ValueError.

    Args:
        stock: The diffusers class.
        reasons: What the error says, by the name of the method.
        unless: Instances for which the stock class' method is called all the same.
    """
    known = dir(stock)
    return {name: _refusal(getattr(stock, name), reason, unless) for name, reason in reasons.items() if name in known}


def _refusal(method: Callable[..., Any], reason: str, unless: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(method)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not unless(self):
            raise ValueError(reason)
        return method(self, *args, **kwargs)

    return refuse


def check_not_tensor_parallel(config: Any) -> None:
    """Raises ValueError if what diffusers' `enable_parallelism` is given asks for tensor parallelism."""
    values = vars(config)
    if type(config).__name__ == "TensorParallelConfig" or values.get("tensor_parallel_config") is not None:
        raise ValueError(
            "tensor parallelism gives every process the same number of heads and neurons, which sizes do not have; use "
            "context parallelism"
        )

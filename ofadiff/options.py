"""Options of what stands in a table, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def check_options(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError if a function does not take these options: its parameters that have a default.

    Args:
        what: What to call it, such as `"strategy 'linear'"`.
        function: The function.
        options: By name.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.default not in (inspect.Parameter.empty, None)]
    for name in options:
        if name not in known:
            raise ValueError(f"{what} takes no option {name!r}; it takes {', '.join(known) or 'none'}")

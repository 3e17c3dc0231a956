"""The pipeline of an extracted size."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import (
    DiffusionPipeline,
)


class OneSizePipeline:
    """What the pipeline of an extracted size adds to its class: an error where a size is asked for."""

    ofa_size: float
    _stock_class: type[DiffusionPipeline]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call.

        Raises:
            ValueError: If it is given a size.
        """
        for name in ("size", "guidance_size", "autoguidance_scale"):
            if name in kwargs:
                raise ValueError(
                    f"{name} is {kwargs[name]!r}, but this {type(self).__name__} was extracted at size "
                    f"{self.ofa_size:g} and has no other; call the OFAPipeline with {name}="
                )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple:
        return _new_one_size_pipeline, (self._stock_class,), self.__dict__


@functools.cache
def one_size_pipeline_class(stock: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A diffusers pipeline class whose call refuses `size=`, under the same name."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return OneSizePipeline.__call__(self, *args, **kwargs)

    __call__.__signature__ = inspect.signature(stock.__call__)  # type: ignore[attr-defined]
    __call__.__doc__ = stock.__call__.__doc__
    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__call__": __call__,
        "_stock_class": stock,
    }
    return type(stock.__name__, (OneSizePipeline, stock), namespace)


def _new_one_size_pipeline(stock: type[DiffusionPipeline]) -> DiffusionPipeline:
    cls: Any = one_size_pipeline_class(stock)  # type: ignore[arg-type]
    return cls.__new__(cls)

"""Classes that stand in for a diffusers class, and have to pass for it.

diffusers' own `from_pipe` takes a component over only if its type *equals* one that the new pipeline's signature names:
a subclass is left out. So the classes of supernets and of extracted models are equal to their stock class.
"""

from __future__ import annotations

from typing import Any


def stock_class(cls: type) -> Any:
    """The diffusers class that a class stands in for; any other class itself."""
    return vars(cls).get("_stock_class", cls)


class StandIn(type):
    """Type of classes that equal the class under their `_stock_class`, and each other if they share it.

    A class derived from one of them is an ordinary class again.
    """

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and stock_class(cls) is stock_class(other)

    def __hash__(cls) -> int:
        return type.__hash__(stock_class(cls))


class SupernetType(StandIn):
    """Type of the classes of supernets, which carry the name of their stock class: an instance of either is of both."""

    def __instancecheck__(cls, instance: Any) -> bool:
        stock = stock_class(cls)
        return super().__instancecheck__(instance) if stock is cls else isinstance(instance, stock)

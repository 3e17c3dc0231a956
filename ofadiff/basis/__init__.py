"""The basis that a group's units are written in: their order, the rotation of attention heads, and the way back."""

from ofadiff.basis.change import (
    BASIS_NAME,
    PERMUTATION,
    apply_change,
    change_module,
    change_of_basis,
    compact,
    inverse_transpose,
    load_basis,
    save_basis,
)

__all__ = [
    "BASIS_NAME",
    "PERMUTATION",
    "apply_change",
    "change_module",
    "change_of_basis",
    "compact",
    "inverse_transpose",
    "load_basis",
    "save_basis",
]

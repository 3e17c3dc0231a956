"""How many units each group keeps at a size: equation 5, the widths that a group may have, and the budgets."""

from ofadiff.allocation.allocation import allocate
from ofadiff.allocation.budgets import BUDGETS
from ofadiff.allocation.width_ladders import ladder, ladders

__all__ = ["BUDGETS", "allocate", "ladder", "ladders"]

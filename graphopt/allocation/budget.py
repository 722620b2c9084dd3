"""Say what a model may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from graphopt.errors import BudgetError

__all__ = ["Budget"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a model may cost at most; every field that is given holds.

    Up to 1 a number is a fraction of the original model's cost, above 1 it is absolute.

    Attributes:
        flops: Floating-point operations of one forward pass of the example inputs, two a multiply-add.
        params: Parameters, a shared one once.
        memory: Bytes that inference holds at its peak: all weights and buffers, plus the inputs and results that are
            live at the same time (:attr:`graphopt.cost.Cost.memory`).
        latency: Seconds on the target; needs a table of measured operators.

    Raises:
        BudgetError: no field is given, or one is not a finite positive number.
    """

    flops: float | None = None
    params: float | None = None
    memory: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BudgetError(f"the budget's {name} must be a number; found {value!r}")
            if not math.isfinite(value) or value <= 0:
                raise BudgetError(
                    f"the budget's {name} must be positive and finite; found {value!r}. Up to 1 it is a fraction of "
                    "the original, above 1 absolute"
                )
        if not self._items():
            names = ", ".join(f.name for f in fields(self))
            raise BudgetError(f"the budget limits nothing; give at least one of {names}, such as flops=0.5")

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """Return the absolute limit of each field that is given.

        Args:
            original: what the original model costs, for every field that a model of the costs knows.

        Raises:
            BudgetError: a field is given whose cost is not known.
        """
        found = {}
        for name, value in self._items():
            if name not in original:
                raise BudgetError(
                    f"the budget limits {name}, but there is no table of measured {name} for this target; "
                    f"give {', '.join(original)} instead"
                )
            found[name] = value * original[name] if value <= 1 else float(value)
        return found

    def in_own_unit(self, name: str, cost: float, original: float) -> float:
        """Return an absolute cost in the unit in which this budget states the field: a fraction, or absolute."""
        stated = getattr(self, name)
        return cost / original if stated is not None and stated <= 1 and original > 0 else cost

    def _items(self) -> list[tuple[str, float]]:
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, value) for name, value in values if value is not None]

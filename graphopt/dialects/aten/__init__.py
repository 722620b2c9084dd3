"""The ATen dialect: every operator that ``torch.export`` records, by family.

What may live here: thin tables from operator objects to :class:`~graphopt.axes.infer.Operator`. A table reads its
operators' arguments by schema name and names a rule of ``axes/rules.py``; it decides nothing about axes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.axes.infer import Operator, Typing
from graphopt.axes.infer import infer as _infer
from graphopt.dialects.aten import (
    contraction,
    creation,
    elementwise,
    indexing,
    normalisation,
    reduction,
    shape,
    spatial,
)
from graphopt.graph import Graph

_FAMILIES = (elementwise, shape, contraction, normalisation, reduction, indexing, creation, spatial)


def _merge() -> dict[Any, Operator]:
    merged: dict[Any, Operator] = {}
    for family in _FAMILIES:
        for target, operator in family.OPERATORS.items():
            if target in merged:
                raise ValueError(f"{target} has two entries in the ATen dialect; keep the one in {family.__name__}")
            merged[target] = operator
    return merged


OPERATORS: Mapping[Any, Operator] = _merge()


def infer(graph: Graph, extra: Mapping[Any, Operator] | None = None) -> Typing:
    """Infer the axes of every value of an ATen graph; ``extra`` adds or replaces operators, for custom kernels."""
    _register_late_operators()
    return _infer(graph, {**OPERATORS, **_LATE, **extra} if extra else {**OPERATORS, **_LATE})


_LATE: dict[Any, Operator] = {}


def _register_late_operators() -> None:
    """Add operators that exist only once the library that defines them was imported."""
    _LATE.update(contraction.late_operators())


__all__ = ["OPERATORS", "infer"]

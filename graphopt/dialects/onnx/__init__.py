"""The ONNX dialect: operators of ONNX as targets of a graph, and what each of them does to axes, by family.

What may live here: thin tables from the keys of operators to :class:`~graphopt.axes.infer.Operator`. A table reads its
operators' inputs and attributes by schema name and names a rule of ``axes/rules.py``; it decides nothing about axes
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphopt.axes.infer import Operator
from graphopt.dialects.onnx import (
    attention,
    contraction,
    creation,
    elementwise,
    indexing,
    normalisation,
    quantization,
    reduction,
    shape,
    spatial,
)
from graphopt.dialects.onnx.operators import Op, known, op

__all__ = ["ENTRIES", "OPERATORS"]

_FAMILIES = (
    attention,
    contraction,
    creation,
    elementwise,
    indexing,
    normalisation,
    quantization,
    reduction,
    shape,
    spatial,
)


def _merge() -> dict[str, Operator]:
    merged: dict[str, Operator] = {}
    for family in _FAMILIES:
        for key, operator in family.ENTRIES.items():
            if key in merged:
                raise ValueError(f"{key} has two entries in the ONNX dialect; keep the one in {family.__name__}")
            merged[key] = operator
    return merged


ENTRIES: Mapping[str, Operator] = _merge()
"""What is known of each operator, by its key."""


class _ByOperator(Mapping[Op, Operator]):
    """The entries by operator. Nothing of onnx is imported before an operator is asked for."""

    def __getitem__(self, target: Op) -> Operator:
        if not isinstance(target, Op):
            raise KeyError(target)
        return ENTRIES[target.key]

    def __iter__(self) -> Iterator[Op]:
        return (op(key) for key in ENTRIES if known(key))

    def __len__(self) -> int:
        return sum(1 for _ in self)


OPERATORS: Mapping[Op, Operator] = _ByOperator()
"""What is known of each operator that the installed version of onnx has, by the operator."""

"""What the families of the ATen dialect share: operators by name, and which of them choose."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.infer import Operator

aten = torch.ops.aten


def overloads(*names: str) -> list[Any]:
    """Return the operators of these names, ``name`` or ``name.overload``; all overloads when none is given.

    ``out=`` variants are left out, which capture never records, and those on numbers or on lists alone.
    """
    found: list[Any] = []
    for name in names:
        packet, _, overload = name.partition(".")
        each = getattr(aten, packet)
        wanted = [overload] if overload else [o for o in each.overloads() if _on_tensors(getattr(each, o)._schema)]
        found.extend(getattr(each, o) for o in wanted)
    return found


def _on_tensors(schema: Any) -> bool:
    return any(str(a.type) == "Tensor" for a in schema.arguments) and not any(a.is_out for a in schema.arguments)


def table(operator: Operator, *names: str) -> dict[Any, Operator]:
    """Return entries that give all these operators one meaning."""
    return dict.fromkeys(overloads(*names), operator)


CHOOSING = frozenset({aten.topk.default, aten.max.dim, aten.argmax.default})
"""Operators that yield positions of the largest entries along ``dim``."""

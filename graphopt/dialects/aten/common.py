"""What the families of the ATen dialect share: reading arguments, and the commonest entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.axes.infer import Atoms, Axes, Operator, Positions, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast
from graphopt.graph import Call, TensorSpec, hint, spec_of

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


def optional(t: Typer, value: Any) -> Axes | None:
    """Return the axes of an operand that may be absent."""
    return t[value] if isinstance(value, fx.Node) else None


def operands(call: Call) -> list[fx.Node]:
    """Return the tensor arguments, in the order of the schema."""
    given = (*call.node.args, *call.node.kwargs.values())
    return [n for n in given if isinstance(n, fx.Node) and is_tensor(n)]


def is_tensor(value: Any) -> bool:
    """Say whether an argument is a tensor-valued node, and not a symbolic number."""
    return isinstance(value, fx.Node) and not isinstance(value.meta.get("spec"), int | float | bool | None)


def dims_of(value: Any, rank: int) -> list[int]:
    """Return a ``dim`` argument as a list of non-negative dimensions; absent or empty means all."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, list | tuple) else [value])]


def hints(values: Iterable[Any]) -> list[int]:
    """Return sizes by their example values."""
    return [hint(v) for v in values]


def specs_of(call: Call) -> list[TensorSpec]:
    """Return the types of the tensors that an operator with several results yields."""
    spec = spec_of(call.node)
    return [s for s in spec if isinstance(s, TensorSpec)] if isinstance(spec, tuple) else []


def opaque(t: Typer, call: Call, why: str) -> Value:
    """Type every result with new frozen axes."""
    if isinstance(spec_of(call.node), tuple):
        return [t.opaque(s.shape, why) for s in specs_of(call)]
    return t.opaque(t.shape(), why)


# -- the commonest entries --


def same(t: Typer, call: Call) -> Value:
    """Type an operator whose result has the axes of its first argument."""
    return t[call.node.args[0]]


def zeros_of_first(z: Zeros, call: Call) -> Atoms:
    """Pass on the zeros of the first argument: f(0) = 0."""
    return z[call.node.args[0]]


def elementwise(t: Typer, call: Call) -> Value:
    """Type an operator that broadcasts all of its tensor arguments."""
    return broadcast(t, *(t[n] for n in operands(call)))


def frozen_dims(dims: Sequence[int], x: Axes, t: Typer, why: str) -> None:
    """Freeze some dimensions of a value."""
    for d in dims:
        t.freeze(x[d], why)


def resize_shape(name: str) -> Any:
    """Return a resizer for an argument that holds the shape of the result, entry by entry."""

    def resize(r: Resizer, call: Call) -> None:
        axes = r.axes(call.node)
        call[name] = r.entries(call, call[name], axes)

    return resize


# -- entries that are positions of an axis --


def same_positions(t: Typer, call: Call) -> Positions:
    """Type a result whose entries are some of the first argument's."""
    source = call.node.args[0]
    return t.positions.get(source) if isinstance(source, fx.Node) else None


def no_positions(t: Typer, call: Call) -> Positions:
    """Type a result that holds no positions, of an operator that knows what to do with those it is given."""
    return None


CHOOSING = frozenset({aten.topk.default, aten.max.dim, aten.argmax.default})
"""Operators that yield positions of the largest entries along ``dim``."""

PASS = Operator(same, zeros_of_first)
"""First argument's axes, and zero where it is zero."""

MOVE = Operator(same, zeros_of_first, positions=same_positions)
"""First argument's axes and entries."""

LIKE = Operator(same, zeros_of_first, positions=no_positions)
"""First argument's axes; its entries are not looked at."""

LOSE = Operator(same)
"""First argument's axes; removed entries do not stay zero."""

"""Operators between numbers and the whole numbers that stand for them, and on those whole numbers."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.axes.algebra import Axis
from graphopt.axes.infer import NO_ATOMS, Atoms, Axes, Operator, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, join
from graphopt.dialects.common import over_space
from graphopt.dialects.onnx.common import is_zero, microsoft, results
from graphopt.graph import Call


def _converted(t: Typer, call: Call) -> Value:
    """Scale by one number, by one an index of ``axis``, or by one a block of it: whole blocks may go."""
    x = t[call["x"]]
    names = ("x_scale", "x_zero_point") if call.has("x_scale") else ("y_scale", "y_zero_point")
    for name in names:
        if isinstance(call[name], fx.Node):
            _tie(t, call, x, t[call[name]])
    return x


def _tie(t: Typer, call: Call, x: Axes, numbers: Axes) -> None:
    if all(a.size == 1 for a in numbers):
        return
    dim = call["axis"] % len(x)
    if len(numbers) == 1:
        t.unify(numbers[0], x[dim])
        return
    for d, (axis, number) in enumerate(zip(x, numbers, strict=True)):
        if d != dim:
            t.unify(axis, number)
        else:
            _tie_blocks(t, axis, number, call["block_size"])


def _tie_blocks(t: Typer, axis: Axis, blocks: Axis, size: int) -> None:
    if axis.size != blocks.size * size:
        t.freeze(axis, "its last block is shorter")
        t.freeze(blocks, "its last block is shorter")
        return
    outer, inner = t.split(axis, blocks.size)
    t.unify(outer, blocks)
    t.freeze(inner, "one scale serves a block of it")


def _zeros_of_dequantized(z: Zeros, call: Call) -> Atoms:
    """Zero where the scale is; where the numbers are, too, when zero stands for zero."""
    scale = z.axes(call["x_scale"])
    rank = len(z.axes(call.node))
    blocked = len(scale) > 1
    found = z.at(call.node, call["x_scale"], None if blocked else (call["axis"] % rank,) if scale else ())
    return (
        z.where(call.node, found | z.at(call.node, call["x"]))
        if _centred(call, "x_zero_point")
        else (z.where(call.node, found))
    )


def _zeros_of_quantized(z: Zeros, call: Call) -> Atoms:
    return z[call["x"]] if _centred(call, "y_zero_point") else NO_ATOMS


def _centred(call: Call, name: str) -> bool:
    """Say whether the whole number 0 stands for zero."""
    return call[name] is None or is_zero(call[name])


def _dynamic(t: Typer, call: Call) -> Value:
    """Quantize by the range of all entries, which holds zero anyway: removed zeros do not change it."""
    x = t[call["x"]]
    for axis in x:
        t.contract(axis, call["x"])
    return results(call, x, (), ())


def _pairwise(t: Typer, call: Call) -> Value:
    """Add or multiply whole numbers that broadcast; each side has one scale."""
    return broadcast(t, t[call["A"]], t[call["B"]])


def _concat(t: Typer, call: Call) -> Value:
    """Concatenate every third operand; scale and zero point stand after each."""
    return join(t, [t[n] for n in call["inputs"][::3]], call["axis"])


def _sigmoid(t: Typer, call: Call) -> Value:
    return t[call["X"]]


def _average(t: Typer, call: Call) -> Value:
    x: Any = t[call["X"]]
    if call["channels_last"]:
        for axis in x[1:-1]:
            t.freeze(axis, "a spatial dimension")
        return (x[0], *t.opaque(t.shape()[1:-1], "a spatial dimension"), x[-1])
    return over_space(t, call, x, len(x) - 2)


_DEQUANTIZE = Operator(_converted, _zeros_of_dequantized)
_QUANTIZE = Operator(_converted, _zeros_of_quantized)

ENTRIES: dict[str, Operator] = {
    "QuantizeLinear": _QUANTIZE,
    "DequantizeLinear": _DEQUANTIZE,
    "DynamicQuantizeLinear": Operator(_dynamic),
    **microsoft(_QUANTIZE, "QuantizeLinear"),
    **microsoft(_DEQUANTIZE, "DequantizeLinear"),
    **microsoft(Operator(_pairwise), "QLinearAdd", "QLinearMul"),
    **microsoft(Operator(_concat), "QLinearConcat"),
    **microsoft(Operator(_sigmoid), "QLinearSigmoid"),
    **microsoft(Operator(_average), "QLinearGlobalAveragePool"),
}

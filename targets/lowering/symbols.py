"""Translate arithmetic on sizes: symbolic numbers, which stand as tensors of one entry."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import SPEC, Call, tensor_spec
from graphopt.targets.lowering.elementwise import floor_divide
from graphopt.targets.lowering.emitter import Emitter, Value, scalar_type

aten = torch.ops.aten
Number = Callable[[Emitter, fx.Node], Value]
"""Translate a function on numbers; such functions have no schema, so the node itself is read."""


def _getitem(e: Emitter, node: fx.Node) -> Value:
    source, index = node.args
    values = e.values[source] if isinstance(source, fx.Node) else None
    if not isinstance(values, tuple | list) or not isinstance(index, int):
        raise UnsupportedOperatorError(f"an item of {source}, which yields no list")
    found: Value = values[index]
    return found


def _example(argument: Any) -> Any:
    return argument.meta.get(SPEC) if isinstance(argument, fx.Node) else argument


def _number(e: Emitter, argument: Any, dtype: torch.dtype) -> str:
    """Return a number as a tensor of one entry."""
    if isinstance(argument, fx.Node):
        value = e.values[argument]
        if isinstance(value, str):
            return e.cast(value, scalar_type(_example(argument)), dtype)
        argument = value
    return e.constant([argument], dtype)


def _common(*arguments: Any) -> torch.dtype:
    kinds = [scalar_type(_example(a)) for a in arguments]
    return torch.float64 if torch.float64 in kinds else torch.int64


def _arithmetic(emitted: str) -> Number:
    def translate(e: Emitter, node: fx.Node) -> Value:
        dtype = _common(*node.args)
        return e(emitted, *(_number(e, a, dtype) for a in node.args))

    return translate


def _comparison(emitted: str, *, negated: bool = False) -> Number:
    def translate(e: Emitter, node: fx.Node) -> Value:
        dtype = _common(*node.args)
        found = e(emitted, *(_number(e, a, dtype) for a in node.args))
        return e("Not", found) if negated else found

    return translate


def _logic(emitted: str) -> Number:
    return lambda e, node: e(emitted, *(_number(e, a, torch.bool) for a in node.args))


def _true_division(e: Emitter, node: fx.Node) -> Value:
    a, b = (_number(e, x, torch.float64) for x in node.args)
    return e("Div", a, b)


def _floor_division(e: Emitter, node: fx.Node) -> Value:
    dtype = _common(*node.args)
    a, b = (_number(e, x, dtype) for x in node.args)
    return floor_divide(e, a, b, dtype)


def _remainder(e: Emitter, node: fx.Node) -> Value:
    dtype = _common(*node.args)
    a, b = (_number(e, x, dtype) for x in node.args)
    if dtype is torch.int64:
        return e("Mod", a, b)
    return e("Sub", a, e("Mul", e("Floor", e("Div", a, b)), b))


def _negation(e: Emitter, node: fx.Node) -> Value:
    return e("Neg", _number(e, node.args[0], _common(*node.args)))


def _rounding(emitted: str | None) -> Number:
    """Round a real number to an integer; ``None`` cuts off."""

    def translate(e: Emitter, node: fx.Node) -> Value:
        dtype = _common(*node.args)
        x = _number(e, node.args[0], dtype)
        if dtype is torch.int64:
            return x
        return e.cast(x if emitted is None else e(emitted, x), dtype, torch.int64)

    return translate


def _to_float(e: Emitter, node: fx.Node) -> Value:
    return _number(e, node.args[0], torch.float64)


def _choice(e: Emitter, node: fx.Node) -> Value:
    condition, a, b = node.args
    dtype = _common(a, b)
    return e("Where", _number(e, condition, torch.bool), _number(e, a, dtype), _number(e, b, dtype))


def _root(e: Emitter, node: fx.Node) -> Value:
    return e("Sqrt", _number(e, node.args[0], torch.float64))


NUMBERS: dict[Any, Number] = {
    operator.getitem: _getitem,
    operator.add: _arithmetic("Add"),
    operator.sub: _arithmetic("Sub"),
    operator.mul: _arithmetic("Mul"),
    operator.pow: _arithmetic("Pow"),
    operator.truediv: _true_division,
    operator.floordiv: _floor_division,
    operator.mod: _remainder,
    operator.neg: _negation,
    operator.eq: _comparison("Equal"),
    operator.ne: _comparison("Equal", negated=True),
    operator.lt: _comparison("Less"),
    operator.le: _comparison("LessOrEqual"),
    operator.gt: _comparison("Greater"),
    operator.ge: _comparison("GreaterOrEqual"),
    operator.and_: _logic("And"),
    operator.or_: _logic("Or"),
    torch.sym_not: lambda e, node: e("Not", _number(e, node.args[0], torch.bool)),
    torch.sym_max: _arithmetic("Max"),
    torch.sym_min: _arithmetic("Min"),
    builtins.max: _arithmetic("Max"),
    builtins.min: _arithmetic("Min"),
    torch.sym_int: _rounding(None),
    math.trunc: _rounding(None),
    math.floor: _rounding("Floor"),
    math.ceil: _rounding("Ceil"),
    builtins.round: _rounding("Round"),
    torch.sym_float: _to_float,
    torch.sym_ite: _choice,
    torch.sym_sqrt: _root,
}


def _size(e: Emitter, call: Call) -> Value:
    return e.extent(e[call["self"]], call.spec("self"), call["dim"])


def _count(e: Emitter, call: Call) -> Value:
    return e("Reshape", e("Size", e[call["self"]]), e.constant([1], torch.int64))


def _item(e: Emitter, call: Call) -> Value:
    dtype = scalar_type(call.node.meta[SPEC])
    name = e("Reshape", e[call["self"]], e.constant([1], torch.int64))
    return e.cast(name, tensor_spec(call["self"]).dtype, dtype)


TRANSLATIONS: dict[Any, Callable[[Emitter, Call], Value]] = {
    **dict.fromkeys(overloads("sym_size.int"), _size),
    **dict.fromkeys(overloads("sym_numel.default"), _count),
    **dict.fromkeys(overloads("item.default", "_local_scalar_dense.default"), _item),
}

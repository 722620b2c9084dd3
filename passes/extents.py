"""Say which sizes of values in a graph of the ONNX dialect are always equal, though they vary from call to call.

What may live here: where the size of a dimension comes from. What follows from two sizes being equal is for the passes
to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final

import torch
from torch import fx

from graphopt.dialects.onnx.operators import Op
from graphopt.graph import Call, TensorSpec, spec_of

__all__ = ["BINARY", "SYM_SIZE", "UNARY", "Extent", "Extents"]

SYM_SIZE: Final = torch.ops.aten.sym_size.int

Extent = int | tuple[fx.Node, int]
"""A size: a number, or the size of a node's dimension; two that are equal are so for inputs of every shape."""

UNARY: Final = frozenset(
    {
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
    }
)
"""Operators that compute each entry of their one result from the same entry of their first operand."""
BINARY: Final = frozenset(
    {
        "Add",
        "And",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "PRelu",
        "Pow",
        "Sub",
        "Sum",
        "Where",
        "Xor",
    }
)
"""Operators that compute each entry from the same entries of several operands, which are broadcast."""
_KEEPING: Final = frozenset(
    {"InstanceNormalization", "LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax", "Trilu", "CumSum"}
)
"""Operators whose result has the shape of the first operand though entries meet."""


class Extents:
    """Follow sizes to where they come from; a graph that is edited in the meantime needs a new one."""

    def __init__(self) -> None:
        self._known: dict[tuple[fx.Node, int], Extent] = {}
        self._swept = False

    def __call__(self, value: fx.Node, dim: int) -> Extent:
        """Return the size of a dimension of a tensor."""
        spec = _spec(value)
        if spec is None:
            return value, dim
        dim %= len(spec.shape)
        if not spec.dynamic[dim]:
            return spec.shape[dim]
        key = (value, dim)
        if not self._swept:
            self._sweep(value.graph)
        if key not in self._known:
            self._known[key] = key  # what asks for itself on the way
            found = self._follow(value, dim)
            self._known[key] = key if found is None else found
        return self._known[key]

    def _sweep(self, graph: fx.Graph) -> None:
        """Go over all values in order, so that each finds those before it known, however long the graph is."""
        self._swept = True
        for node in graph.nodes:
            self.shape(node)

    def shape(self, value: fx.Node) -> tuple[Extent, ...]:
        """Return the sizes of all dimensions."""
        spec = _spec(value)
        return () if spec is None else tuple(self(value, dim) for dim in range(len(spec.shape)))

    def same(self, a: fx.Node, b: fx.Node) -> bool:
        """Say whether two tensors have one shape, whatever the inputs' sizes."""
        return _spec(a) is not None and _spec(b) is not None and self.shape(a) == self.shape(b)

    def size(self, entry: Any) -> Extent | None:
        """Return the size that an entry of a list of sizes stands for; None where it is computed in other ways."""
        if isinstance(entry, int):
            return entry
        if isinstance(entry, fx.Node) and entry.target is SYM_SIZE:
            of, dim = entry.args
            return self(of, dim)  # type: ignore[arg-type]
        return None

    def _follow(self, value: fx.Node, dim: int) -> Extent | None:
        if value.op != "call_function" or not isinstance(value.target, Op):
            return None
        name = value.target.key
        if name in UNARY or name in _KEEPING:
            return self(value.args[0], dim)  # type: ignore[arg-type]
        if name in BINARY:
            return self._broadcast(_operands(value), len(_shape(value)) - dim)
        rule = _RULES.get(name)
        return rule(self, Call(value), dim) if rule is not None else None

    def _broadcast(self, operands: Sequence[fx.Node], place: int) -> Extent | None:
        """Return the size at a place, counted from the end, of what operands are broadcast to."""
        found = {self(each, -place) for each in operands if place <= len(_shape(each))} - {1}
        return found.pop() if len(found) == 1 else None

    def _reshape(self, call: Call, dim: int) -> Extent | None:
        x, entries = call["data"], call["shape"]
        if not isinstance(entries, list | tuple):
            return None
        entry = entries[dim]
        if isinstance(entry, int) and entry == 0 and not call["allowzero"]:
            return self(x, dim)
        if not isinstance(entry, int) or entry != -1:
            return self.size(entry)
        # One dimension that varies on both sides, and otherwise as many entries: it is the same.
        spec, out = _spec(x), _spec(call.node)
        if spec is None or out is None or sum(spec.dynamic) != 1 or sum(out.dynamic) != 1:
            return None
        rest = [prod(n for n, varies in zip(s.shape, s.dynamic, strict=True) if not varies) for s in (spec, out)]
        return self(x, spec.dynamic.index(True)) if rest[0] == rest[1] else None

    def _transpose(self, call: Call, dim: int) -> Extent | None:
        order = call["perm"] or range(len(_shape(call.node)))[::-1]
        return self(call["data"], order[dim])

    def _unsqueeze(self, call: Call, dim: int) -> Extent | None:
        rank = len(_shape(call.node))
        added = {axis % rank for axis in call["axes"]}
        return self(call["data"], [d for d in range(rank) if d not in added].index(dim))

    def _squeeze(self, call: Call, dim: int) -> Extent | None:
        spec = _spec(call["data"])
        if spec is None or call["axes"] is None:
            return None
        gone = {axis % len(spec.shape) for axis in call["axes"]}
        return self(call["data"], [d for d in range(len(spec.shape)) if d not in gone][dim])

    def _concat(self, call: Call, dim: int) -> Extent | None:
        if dim == call["axis"] % len(_shape(call.node)):
            return None
        found = {self(each, dim) for each in call["inputs"]}
        return found.pop() if len(found) == 1 else None

    def _slice(self, call: Call, dim: int) -> Extent | None:
        rank = len(_shape(call.node))
        axes = range(len(call["starts"])) if call["axes"] is None else call["axes"]
        if not isinstance(axes, list | tuple | range) or dim in {axis % rank for axis in axes}:
            return None
        return self(call["data"], dim)

    def _expand(self, call: Call, dim: int) -> Extent | None:
        x, entries = call["input"], call["shape"]
        if not isinstance(entries, list | tuple):
            return None
        rank, place = len(_shape(call.node)), len(_shape(call.node)) - dim
        own: Extent = self(x, -place) if place <= len(_shape(x)) else 1
        wanted = self.size(entries[dim - rank]) if place <= len(entries) else 1
        found = {own, wanted} - {1}
        return found.pop() if len(found) == 1 else None

    def _gather(self, call: Call, dim: int) -> Extent | None:
        x, indices = call["data"], call["indices"]
        axis, depth = call["axis"] % len(_shape(x)), len(_shape(indices))
        if dim < axis:
            return self(x, dim)
        return self(indices, dim - axis) if dim < axis + depth else self(x, dim - depth + 1)

    def _matmul(self, call: Call, dim: int) -> Extent | None:
        a, b = call["A"], call["B"]
        place = len(_shape(call.node)) - dim
        if min(len(_shape(a)), len(_shape(b))) < 2:
            return None
        if place <= 2:
            return self(a, -2) if place == 2 else self(b, -1)
        return self._broadcast((a, b), place)

    def _batch(self, call: Call, dim: int) -> Extent | None:
        return self(call.node.args[0], 0) if dim == 0 else None  # type: ignore[arg-type]

    def _reduced(self, call: Call, dim: int) -> Extent | None:
        x, axes = call["data"], call["axes"]
        rank = len(_shape(x))
        if not call["keepdims"] or not axes or dim in {axis % rank for axis in axes}:
            return None
        return self(x, dim)


def _spec(value: Any) -> TensorSpec | None:
    spec = spec_of(value) if isinstance(value, fx.Node) else None
    return spec if isinstance(spec, TensorSpec) else None


def _shape(value: Any) -> tuple[int, ...]:
    spec = _spec(value)
    return () if spec is None else spec.shape


def _operands(node: fx.Node) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if _spec(each) is not None]


_RULES: Final[dict[str, Callable[[Extents, Call, int], Extent | None]]] = {
    "Concat": Extents._concat,
    "Expand": Extents._expand,
    "Gather": Extents._gather,
    "MatMul": Extents._matmul,
    "Reshape": Extents._reshape,
    "Slice": Extents._slice,
    "Squeeze": Extents._squeeze,
    "Transpose": Extents._transpose,
    "Unsqueeze": Extents._unsqueeze,
    **dict.fromkeys(
        ("AveragePool", "BatchNormalization", "Conv", "GlobalAveragePool", "MaxPool"),
        Extents._batch,
    ),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), Extents._reduced),
}

"""Say, operator by operator, what a call does in another order of its operand's dimensions.

What may live here: rules. Where it is worth while to compute in another order, the pass finds out.

An *order* q of a value v says that v = Transpose(w, perm=q) of a value w that is there, too: dimension i of v is
dimension q[i] of w.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import fx

from graphopt.graph import Call, TensorSpec
from graphopt.passes.extents import BINARY, UNARY
from graphopt.passes.onnx_calls import is_call, tensor_type

__all__ = ["Moved", "Order", "composed", "inverse", "is_plain", "moved", "reordered"]

Order = tuple[int, ...]


@dataclass(frozen=True)
class Moved:
    """Say what computes, from operands in the other order, a result in another order.

    Attributes:
        order: The order of the result.
        operands: The operands that must be in the other order, too; the others stay.
        changes: What the call's other arguments are.
    """

    order: Order
    operands: tuple[fx.Node, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def inverse(order: Order) -> Order:
    """Return the order that undoes another."""
    found = [0] * len(order)
    for i, dim in enumerate(order):
        found[dim] = i
    return tuple(found)


def composed(inner: Order, outer: Order) -> Order:
    """Return the order of ``Transpose(Transpose(x, inner), outer)``."""
    return tuple(inner[dim] for dim in outer)


def is_plain(order: Order) -> bool:
    """Say whether the order changes nothing."""
    return order == tuple(range(len(order)))


def reordered(spec: TensorSpec, order: Order) -> TensorSpec:
    """Return the type of w, where v = Transpose(w, order) has the type ``spec``."""
    back = inverse(order)
    return TensorSpec(tuple(spec.shape[i] for i in back), spec.dtype, tuple(spec.dynamic[i] for i in back))


def moved(node: fx.Node, value: fx.Node, order: Order, wished: Order) -> Moved | None:
    """Say how the call ``node`` follows when its operand ``value`` has another order; None where it cannot.

    Where the order of the result can be chosen it is ``wished``.
    """
    if node.target is operator.getitem:
        return Moved(order, (value,)) if isinstance(node.args[1], int) else None
    if not is_call(node):
        return None
    name = node.target.key  # type: ignore[union-attr]
    if name in UNARY:
        return Moved(order, (value,))
    if name in BINARY:
        return _broadcast(node, order)
    if name == "Unsqueeze":
        return _unsqueezed(Call(node), value, order, wished)
    rule = _RULES.get(name)
    if rule is None or (node.args[0] is not value and name != "Concat"):
        return None
    return rule(Call(node), value, order)


def _broadcast(node: fx.Node, order: Order) -> Moved | None:
    out = tensor_type(node)
    if out is None or len(out.shape) != len(order):
        return None
    needed = []
    for each in node.all_input_nodes:
        spec = tensor_type(each)
        if spec is None:
            return None
        if set(spec.shape) <= {1} and not any(spec.dynamic):
            continue  # one number, whatever the order
        if len(spec.shape) != len(order) and each.op != "get_attr":
            return None
        needed.append(each)
    return Moved(order, tuple(needed))


def _concat(call: Call, value: fx.Node, order: Order) -> Moved:
    return Moved(order, tuple(dict.fromkeys(call["inputs"])), {"axis": order[call["axis"]]})


def _softmax(call: Call, value: fx.Node, order: Order) -> Moved | None:
    axis = order[call["axis"]]
    last = len(order) - 1
    if axis != last and call["axis"] in (-1, last):
        return None  # runtimes are slower across memory than along it
    return Moved(order, (value,), {"axis": axis})


def _normalised(call: Call, value: fx.Node, order: Order) -> Moved | None:
    axis = call["axis"] % len(order)
    return Moved(order, (value,)) if all(order[i] == i for i in range(axis, len(order))) else None


def _product(call: Call, value: fx.Node, order: Order) -> Moved | None:
    """``Transpose(x) W = Transpose(x W)`` for a matrix W and an order that leaves the last dimension."""
    weight = tensor_type(call["B"])
    if weight is None or len(weight.shape) != 2 or order[-1] != len(order) - 1 or call["B"] is value:
        return None
    return Moved(order, (value,))


def _reduced(call: Call, value: fx.Node, order: Order) -> Moved | None:
    axes = call["axes"]
    if not isinstance(axes, list | tuple) or not axes:
        return None
    gone = [order[axis] for axis in axes]
    kept = order if call["keepdims"] else _without(order, gone)
    return Moved(kept, (value,), {"axes": sorted(gone)})


def _without(order: Order, gone: Sequence[int]) -> Order:
    """Return the order of what is left when dimensions of the value in the other order are gone."""
    left = [dim for dim in order if dim not in gone]
    ranks = {dim: i for i, dim in enumerate(sorted(left))}
    return tuple(ranks[dim] for dim in left)


def _squeezed(call: Call, value: fx.Node, order: Order) -> Moved | None:
    axes = call["axes"]
    if not isinstance(axes, list | tuple):
        return None
    gone = [order[axis] for axis in axes]
    return Moved(_without(order, gone), (value,), {"axes": sorted(gone)})


def _unsqueezed(call: Call, value: fx.Node, order: Order, wished: Order) -> Moved:
    """Put new dimensions of size 1 where they belong in the order that is wished, or leave them where they stand."""
    rank = len(order) + len(call["axes"])
    added = [axis % rank for axis in call["axes"]]
    for places in (wished, tuple(range(rank))):
        if len(places) != rank:
            continue
        taken = [places[dim] for dim in added]
        free = [dim for dim in range(rank) if dim not in taken]
        dims = iter(order)
        found = tuple(places[dim] if dim in added else free[next(dims)] for dim in range(rank))
        if found == wished or places is not wished:
            break
    return Moved(found, (value,), {"axes": sorted(taken)})


def _sliced(call: Call, value: fx.Node, order: Order) -> Moved | None:
    axes = range(len(call["starts"])) if call["axes"] is None else call["axes"]
    if any(not isinstance(axis, int) for axis in axes):
        return None
    return Moved(order, (value,), {"axes": [order[axis] for axis in axes]})


def _padded(call: Call, value: fx.Node, order: Order) -> Moved | None:
    pads, axes = call["pads"], call["axes"]
    if not isinstance(pads, list | tuple):
        return None
    if axes is not None:
        return Moved(order, (value,), {"axes": [order[axis] for axis in axes]})
    rank, back = len(order), inverse(order)
    return Moved(order, (value,), {"pads": [pads[i] for i in back] + [pads[rank + i] for i in back]})


def _split(call: Call, value: fx.Node, order: Order) -> Moved:
    return Moved(order, (value,), {"axis": order[call["axis"]]})


def _gathered(call: Call, value: fx.Node, order: Order) -> Moved | None:
    indices = tensor_type(call["indices"])
    if indices is None or len(indices.shape) > 1 or call["indices"] is value:
        return None
    axis = order[call["axis"]]
    return Moved(order if indices.shape else _without(order, [axis]), (value,), {"axis": axis})


_REDUCTIONS: Final = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

_RULES: Final[dict[str, Callable[[Call, fx.Node, Order], Moved | None]]] = {
    **dict.fromkeys((f"Reduce{each}" for each in _REDUCTIONS.split(" ")), _reduced),
    "Concat": _concat,
    "Gather": _gathered,
    "LayerNormalization": _normalised,
    "LogSoftmax": _softmax,
    "MatMul": _product,
    "Pad": _padded,
    "RMSNormalization": _normalised,
    "Slice": _sliced,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeezed,
}

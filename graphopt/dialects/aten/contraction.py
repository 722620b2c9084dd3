"""Operators that multiply and sum: linear layers, convolutions, matrix products, einsum, attention, recurrences."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import fx

from graphopt.axes.algebra import ONE
from graphopt.axes.infer import Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import attention, broadcast, convolution, linear, matmul
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import einsum_of, faces_of_matmul, mark_attention, operands, optional
from graphopt.graph import Call, spec_of

aten = torch.ops.aten


def _linear(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    t.contract(x[-1], call["input"], call["weight"])
    return linear(t, x, t[call["weight"]], optional(t, call["bias"]))


def _zeros_of_linear(z: Zeros, call: Call) -> Atoms:
    node, places = call.node, range(len(z.axes(call["input"])) - 1)
    last = len(z.axes(node)) - 1
    weight = (last, None) if len(z.axes(call["weight"])) == 2 else (None,)
    found = z.at(node, call["input"], (*places, None)) | z.at(node, call["weight"], weight)
    return z.where(node, found if call["bias"] is None else found & z.at(node, call["bias"]))


def _zeros_of_convolution(z: Zeros, call: Call) -> Atoms:
    node, rank, extents = call.node, len(z.axes(call.node)), len(z.axes(call["weight"])) - 2
    channel = rank - extents - 1
    # The rows of a transposed weight are its groups, which stay, and channels, which are summed over.
    rows = (channel if call["groups"] > 1 else None, channel) if _is_transposed(call) else (channel, None)
    found = z.at(node, call["weight"], (*rows, *[None] * extents))
    found |= z.at(node, call["input"], [None if d == channel else d for d in range(rank)])
    return z.where(node, found if call["bias"] is None else found & z.at(node, call["bias"], (channel,)))


def _is_transposed(call: Call) -> bool:
    return bool(call["transposed"]) if call.has("transposed") else "transpose" in call.name


def _convolution(t: Typer, call: Call) -> Value:
    found = convolution(
        t,
        t[call["input"]],
        t[call["weight"]],
        optional(t, call["bias"]),
        t.shape(),
        groups=call["groups"],
        transposed=_is_transposed(call),
        moves=_moves(call),
    )
    t.facts[call.node] = found.groups
    t.contract(found.summed, call["input"], call["weight"])
    return found.out


def _moves(call: Call) -> bool:
    """Say whether a convolution steps or pads, so that even a kernel of extent one moves its places."""
    padding = call["padding"]
    return any(s != 1 for s in call["stride"]) or (isinstance(padding, list | tuple) and any(p != 0 for p in padding))


def _resize_convolution(r: Resizer, call: Call) -> None:
    if r.fact is not ONE and r.changed(r.fact):
        call["groups"] = r.size(r.fact)


def _matmul(t: Typer, call: Call) -> Value:
    first, second = operands(call)
    out, inner = matmul(t, t[first], t[second])
    t.contract(inner, first, second)
    mark_attention(t, first, second, out, inner)
    return out


def _zeros_of_matmul(z: Zeros, call: Call) -> Atoms:
    return z.where(call.node, faces_of_matmul(z, call.node, *operands(call)))


def _addmm(t: Typer, call: Call) -> Value:
    bias, first, second = operands(call)
    out, inner = matmul(t, t[first], t[second])
    t.contract(inner, first, second)
    return broadcast(t, t[bias], out)


def _zeros_of_addmm(z: Zeros, call: Call) -> Atoms:
    bias, first, second = operands(call)
    return z.where(call.node, z.at(call.node, bias) & faces_of_matmul(z, call.node, first, second))


def _attention(t: Typer, call: Call) -> Value:
    q, k, v = (t[call[name]] for name in ("query", "key", "value"))
    t.contract(q[-1], call["query"], call["key"])
    if call["is_causal"]:
        t.freeze(q[-2], "causal attention over it")
    return attention(t, q, k, v, optional(t, call["attn_mask"]), grouped=bool(call["enable_gqa"]))


def _zeros_of_attention(z: Zeros, call: Call) -> Atoms:
    """Zero where the values are: in their batch, heads and width."""
    rank, own = len(z.axes(call.node)), len(z.axes(call["value"]))
    return z.where(call.node, z.at(call.node, call["value"], (*range(rank - own, rank - 2), None, rank - 1)))


def _resize_attention(r: Resizer, call: Call) -> None:
    """Make the scale explicit: the default would follow the pruned width."""
    width = r.axes(call["query"])[-1]
    if call["scale"] is None and r.changed(width):
        call["scale"] = 1 / sqrt(width.size)


def _outer(t: Typer, call: Call) -> Value:
    a, b = operands(call)
    return (*t[a], *t[b])


def _zeros_of_outer(z: Zeros, call: Call) -> Atoms:
    a, b = operands(call)
    return z.where(call.node, z.at(call.node, a, (0,)) | z.at(call.node, b, (1,)))


def _bilinear(t: Typer, call: Call) -> Value:
    x, y, weight = t[call["input1"]], t[call["input2"]], t[call["weight"]]
    t.contract(x[-1], call["input1"], call["weight"])
    t.contract(y[-1], call["input2"], call["weight"])
    t.unify(x[-1], weight[1])
    t.unify(y[-1], weight[2])
    batch = broadcast(t, x[:-1], y[:-1])
    bias = optional(t, call["bias"])
    if bias is not None:
        t.unify(bias[0], weight[0])
    t.multiply(*batch, *weight)
    return (*batch, weight[0])


def _zeros_of_bilinear(z: Zeros, call: Call) -> Atoms:
    rank = len(z.axes(call.node))
    found = z.at(call.node, call["weight"], (rank - 1, None, None))
    for name in ("input1", "input2"):
        found |= z.at(call.node, call[name], (*range(rank - 1), None))
    return z.where(call.node, found if call["bias"] is None else found & z.at(call.node, call["bias"]))


def _grouped_mm(t: Typer, call: Call) -> Value:
    """Rows sorted by expert times that expert's matrix: ``x (s, k)``, ``weight (experts, k, n)`` -> ``(s, n)``.

    An expert that no row is given to is not computed, so experts that are never chosen can go with their offsets.
    """
    x, weight, offsets = (t[n] for n in operands(call)[:3])
    if t.is_chosen(offsets[0]):
        t.unify(weight[0], offsets[0])
    else:
        t.freeze(weight[0], "an expert is chosen by data")
        t.freeze(offsets[0], "an expert is chosen by data")
    t.unify(x[-1], weight[-2])
    t.multiply(x[0], weight[-2], weight[-1])
    return (*x[:-1], weight[-1])


def _zeros_of_grouped_mm(z: Zeros, call: Call) -> Atoms:
    x, weight = operands(call)[:2]
    rank = len(z.axes(call.node))
    found = z.at(call.node, x, (*range(rank - 1), None))
    return z.where(call.node, found | z.at(call.node, weight, (None, None, rank - 1)))


def _recurrent(t: Typer, call: Call) -> Value:
    """Freeze a recurrent layer whole: gates, directions and layers share one packed width."""
    why = "a recurrent layer packs gates, directions and layers into one width"

    def freeze(value: Any) -> None:
        if isinstance(value, fx.Node) and isinstance(t.values.get(value), tuple):
            for axis in t[value]:
                t.freeze(axis, why)
        elif isinstance(value, list | tuple):
            for each in value:
                freeze(each)

    freeze(list(call.node.args))
    spec = spec_of(call.node)
    assert isinstance(spec, tuple)
    return [t.opaque(s.shape, why) for s in spec]  # type: ignore[union-attr]


_CONV = Operator(_convolution, _zeros_of_convolution, _resize_convolution)
_PRODUCT = Operator(_matmul, _zeros_of_matmul)
_SUM_OF_PRODUCT = Operator(_addmm, _zeros_of_addmm)
_RECURRENT = Operator(_recurrent)

OPERATORS: dict[Any, Operator] = {
    aten.linear.default: Operator(_linear, _zeros_of_linear),
    **table(
        _CONV, "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
    ),
    **table(
        _PRODUCT, "matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default", "linalg_matmul.default"
    ),
    **table(_SUM_OF_PRODUCT, "addmm.default", "baddbmm.default", "addmv.default"),
    aten.einsum.default: einsum_of("tensors"),
    aten.scaled_dot_product_attention.default: Operator(_attention, _zeros_of_attention, _resize_attention),
    **table(Operator(_outer, _zeros_of_outer), "outer.default", "ger.default"),
    aten.bilinear.default: Operator(_bilinear, _zeros_of_bilinear),
    **table(_RECURRENT, "lstm.input", "lstm.data", "gru.input", "gru.data", "rnn_tanh.input", "rnn_relu.input"),
    **table(_RECURRENT, "rnn_tanh.data", "rnn_relu.data"),
}

_GROUPED = Operator(_grouped_mm, _zeros_of_grouped_mm)


def late_operators() -> dict[Any, Operator]:
    """Return entries for custom operators of libraries that happen to be imported."""
    found: dict[Any, Operator] = {}
    for namespace, name in (("transformers", "grouped_mm_fallback"), ("aten", "_grouped_mm")):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found[packet.default] = _GROUPED
    return found

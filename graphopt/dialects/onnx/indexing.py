"""Operators that address entries by data: gathers, embeddings, scatters, one-hot rows, selections."""

from __future__ import annotations

from graphopt.axes.algebra import Axis, leaves
from graphopt.axes.infer import Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import drop, one_hot
from graphopt.dialects.common import (
    freeze_operands,
    frozen,
    gather_along,
    no_positions,
    opaque,
    same_positions,
    zeros_of_first,
)
from graphopt.dialects.onnx.common import constant, table
from graphopt.graph import Call

_WHY = "addressed by data"
_COUNTED = "counted or searched by data"


def _gather(t: Typer, call: Call) -> Value:
    """Look up slices along ``axis``: the dimensions of the indices take its place."""
    x, indices = t[call["data"]], t[call["indices"]]
    dim = call["axis"] % len(x)
    if not indices and constant(call["indices"]) is not None:
        t.freeze(x[dim], "one of its entries is taken by number")
        return drop(x, [dim], keepdim=False)
    t.address(x[dim], call["indices"], _WHY)
    return (*x[:dim], *indices, *x[dim + 1 :])


def _zeros_of_gather(z: Zeros, call: Call) -> Atoms:
    """Zero where the source is, but not where the same atom stands among the dimensions of the indices."""
    source, extra = z.axes(call["data"]), len(z.axes(call["indices"]))
    dim = call["axis"] % len(source)
    places = [d if d < dim else None if d == dim else d + extra - 1 for d in range(len(source))]
    return z.where(call.node, z.at(call.node, call["data"], places))


def _gather_elements(t: Typer, call: Call) -> Value:
    """Entries move along ``axis``; along the other dimensions index and source must agree where they are whole."""
    return gather_along(t, call["data"], call["indices"], call["axis"], _WHY)


def _gather_nd(t: Typer, call: Call) -> Value:
    """Look up ``data (batch, indexed, rest)`` at ``indices (batch, places, k)`` -> ``(batch, places, rest)``."""
    x, index, batch = t[call["data"]], t[call["indices"]], call["batch_dims"]
    depth = index[-1].size
    for a, b in zip(x[:batch], index[:batch], strict=True):
        t.unify(a, b)
    if depth == 1:
        t.address(x[batch], call["indices"], _WHY)
    else:
        _give_up(t, call)
        for axis in x[batch : batch + depth]:
            t.freeze(axis, _WHY)
    for axis in index[batch:]:
        t.freeze(axis, "the dimension of an index table")
    return (*index[:-1], *x[batch + depth :])


def _zeros_of_gather_nd(z: Zeros, call: Call) -> Atoms:
    index, source, batch = z.axes(call["indices"]), z.axes(call["data"]), call["batch_dims"]
    depth = index[-1].size
    places = [
        d if d < batch else None if d < batch + depth else d - depth - batch + len(index) - 1
        for d in range(len(source))
    ]
    return z.where(call.node, z.at(call.node, call["data"], places))


def _give_up(t: Typer, call: Call) -> None:
    """Keep whole the axis that the indices are positions of."""
    t.address(t.fixed(1, _WHY), call["indices"], _WHY)


def _scatter_elements(t: Typer, call: Call) -> Value:
    """Write entries at positions of ``axis``; along the other dimensions index and target must agree where whole."""
    if not isinstance(t.positions.get(call["indices"]), Axis):
        freeze_operands(t, call, _WHY)
        return t[call["data"]]
    x, index, given = t[call["data"]], t[call["indices"]], t[call["updates"]]
    dim = call["axis"] % len(x)
    t.address(x[dim], call["indices"], _WHY)
    for d, (a, b, c) in enumerate(zip(x, index, given, strict=True)):
        if d != dim and a.size == b.size == c.size:
            t.unify(a, b)
            t.unify(a, c)
        elif d != dim:
            for axis in (a, b, c):
                t.freeze(axis, _WHY)
        else:
            t.freeze(b, _WHY)
            t.freeze(c, _WHY)
    return x


def _zeros_of_scatter_elements(z: Zeros, call: Call) -> Atoms:
    """Find nothing written where an index was removed: it is not among the positions."""
    axes = z.axes(call.node)
    return z[call["data"]] & frozenset(leaves(axes[call["axis"] % len(axes)]))


def _scatter_nd(t: Typer, call: Call) -> Value:
    """Write ``updates (places, rest)`` into ``data (indexed, rest)`` at ``indices (places, k)``; places are fixed."""
    x, index, given = t[call["data"]], t[call["indices"]], t[call["updates"]]
    depth, places = index[-1].size, len(index) - 1
    _give_up(t, call)
    for axis in (*x[:depth], *index, *given[:places]):
        t.freeze(axis, _WHY)
    for a, b in zip(x[depth:], given[places:], strict=True):
        t.unify(a, b)
    return x


def _zeros_of_scatter_nd(z: Zeros, call: Call) -> Atoms:
    return z[call["data"]] & z[call["updates"]]


def _scatter_cache(t: Typer, call: Call) -> Value:
    """Write into a cache along ``axis``, at places of each batch; the other dimensions are shared."""
    x, given = t[call["past_cache"]], t[call["update"]]
    dim = call["axis"] % len(x)
    for d, (a, b) in enumerate(zip(x, given, strict=True)):
        if d == dim:
            t.freeze(a, _WHY)
            t.freeze(b, _WHY)
        else:
            t.unify(a, b)
    for axis in (x[0], *(t[call["write_indices"]] if call["write_indices"] is not None else ())):
        t.freeze(axis, _WHY)
    return x


def _zeros_of_cache(z: Zeros, call: Call) -> Atoms:
    return z[call["past_cache"]] & z[call["update"]]


def _one_hot(t: Typer, call: Call) -> Value:
    """Spread positions out over the axis they are positions of, which is the last of the result or ``axis``."""
    held = t.positions.get(call["indices"])
    if isinstance(held, Axis) and isinstance(call["depth"], int) and len(t[call["indices"]]) + 1 == len(t.shape()):
        made = one_hot(t, t[call["indices"]], held, call["depth"])
        if made is not None:
            t.facts[call.node] = held
            dim = call["axis"] % len(made)
            return (*made[:-1][:dim], made[-1], *made[:-1][dim:])
    _give_up(t, call)
    freeze_operands(t, call, _COUNTED)
    return opaque(t, call, _COUNTED)


def _zeros_of_one_hot(z: Zeros, call: Call) -> Atoms:
    """Find no mark at what was removed: it is not among the positions. What is unmarked has to be zero."""
    values = constant(call["values"])
    if values is None or values.reshape(-1)[0] != 0:
        return frozenset()
    axes = z.axes(call.node)
    return frozenset(leaves(axes[call["axis"] % len(axes)])) & z.atoms(call.node)


def _resize_one_hot(r: Resizer, call: Call) -> None:
    if r.fact is not None and r.changed(r.fact):
        call["depth"] = r.size(r.fact)


def _compress(t: Typer, call: Call) -> Value:
    """Select positions by a mask: the dimension is fixed, the others pass."""
    x = t[call["input"]]
    if call["axis"] is None:
        freeze_operands(t, call, "masked by data")
        return opaque(t, call, "masked by data")
    dim = call["axis"] % len(x)
    for axis in (x[dim], *t[call["condition"]]):
        t.freeze(axis, "masked by data")
    return (*x[:dim], t.fixed(t.shape()[dim], "masked by data"), *x[dim + 1 :])


_SCATTER = Operator(_scatter_elements, _zeros_of_scatter_elements, positions=no_positions)

ENTRIES: dict[str, Operator] = {
    "Gather": Operator(_gather, _zeros_of_gather, positions=same_positions),
    "GatherElements": Operator(_gather_elements, zeros_of_first, positions=same_positions),
    "GatherND": Operator(_gather_nd, _zeros_of_gather_nd, positions=same_positions),
    **table(_SCATTER, "Scatter", "ScatterElements"),
    "ScatterND": Operator(_scatter_nd, _zeros_of_scatter_nd, positions=no_positions),
    "TensorScatter": Operator(_scatter_cache, _zeros_of_cache),
    "OneHot": Operator(_one_hot, _zeros_of_one_hot, _resize_one_hot, no_positions),
    "Compress": Operator(_compress, zeros_of_first),
    **table(frozen(_COUNTED), "NonZero", "Unique", "NonMaxSuppression", "Multinomial"),
    **table(frozen("a loss over all classes"), "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"),
}

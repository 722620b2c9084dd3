"""Operators that address entries by data: embeddings, gathers, index tables, scatters."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.axes.algebra import Axis, leaves
from graphopt.axes.infer import Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import broadcast, one_hot
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import freeze_operands, frozen, gather_along, no_positions, same_positions, zeros_of_first
from graphopt.graph import Call, spec_of

aten = torch.ops.aten
_WHY = "addressed by data"
_COUNTED = "counted or searched by data"


def _embedding(t: Typer, call: Call) -> Value:
    weight = t[call["weight"]]
    t.address(weight[0], call["indices"], _WHY)
    return (*t[call["indices"]], weight[1])


def _index(t: Typer, call: Call) -> Value:
    """Advanced indexing: the dimensions of the indices take the place of those that are indexed, which are frozen.

    A dimension whose positions the indices are known to hold is tied instead with the axis that they are positions of.

    They stand where the first index stood when the indexed dimensions are adjacent, and in front otherwise.
    """
    x = t[call["self"]]
    indices = list(call["indices"]) + [None] * (len(x) - len(call["indices"]))
    if any(isinstance(i, fx.Node) and _is_mask(i) for i in indices):
        for axis in x:
            t.freeze(axis, "masked by data")
        return t.opaque(t.shape(), "masked by data")
    dims = [d for d, i in enumerate(indices) if i is not None]
    for d in dims:
        t.address(x[d], indices[d], _WHY)
    placed = broadcast(t, *(t[i] for i in indices if i is not None))
    for axis in placed:
        t.freeze(axis, "the dimension of an index table")
    rest = [x[d] for d in range(len(x)) if d not in dims]
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    position = dims[0] if adjacent else 0
    return (*rest[:position], *placed, *rest[position:])


def _is_mask(node: fx.Node) -> bool:
    spec = spec_of(node)
    return getattr(spec, "dtype", None) in (torch.bool, torch.uint8)


def _index_select(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    t.address(x[dim], call["index"], _WHY)
    for axis in t[call["index"]]:
        t.freeze(axis, "the dimension of an index table")
    return (*x[:dim], t.fixed(t.shape()[dim], _WHY), *x[dim + 1 :])


def _gather(t: Typer, call: Call) -> Value:
    """Entries move along ``dim``; along the other dimensions index and source must agree where they are whole."""
    return gather_along(t, call["self"], call["index"], call["dim"], _WHY)


def _take_along(t: Typer, call: Call) -> Value:
    """Gather, with index and source broadcast against each other along the other dimensions."""
    x, index = t[call["self"]], t[call["indices"]]
    if call["dim"] is None:
        for axis in (*x, *index):
            t.freeze(axis, _WHY)
        return t.opaque(t.shape(), _WHY)
    dim = call["dim"] % len(x)
    t.address(x[dim], call["indices"], _WHY)
    t.freeze(index[dim], _WHY)
    return (*broadcast(t, x[:dim], index[:dim]), index[dim], *broadcast(t, x[dim + 1 :], index[dim + 1 :]))


def _rigid(t: Typer, call: Call) -> Value:
    """Freeze every tensor operand; the result has the axes of the first."""
    freeze_operands(t, call, _WHY)
    return t[call.node.args[0]]


def _scatter_by_data(t: Typer, call: Call) -> Value:
    """Write entries at positions of ``dim``; along the other dimensions index and target must agree where whole."""
    if not isinstance(t.positions.get(call["index"]), Axis):
        return _rigid(t, call)
    x, index = t[call["self"]], t[call["index"]]
    dim = call["dim"] % len(x)
    t.address(x[dim], call["index"], _WHY)
    t.freeze(index[dim], _WHY)
    given = t[call["src"]] if call.has("src") else index
    for d, (a, b, c) in enumerate(zip(x, index, given, strict=True)):
        if d != dim and a.size == b.size == c.size:
            t.unify(a, b)
            t.unify(a, c)
        elif d != dim:
            for axis in (a, b, c):
                t.freeze(axis, _WHY)
        else:
            t.freeze(c, _WHY)
    return x


def _zeros_of_scatter_by_data(z: Zeros, call: Call) -> Atoms:
    """Find nothing written where an index was removed: it is not among the positions."""
    axes = z.axes(call.node)
    along = frozenset(leaves(axes[call["dim"] % len(axes)]))
    return z[call["self"]] & along


def _one_hot(t: Typer, call: Call) -> Value:
    held = t.positions.get(call["self"])
    classes = call["num_classes"]
    if isinstance(held, Axis) and isinstance(classes, int):
        made = one_hot(t, t[call["self"]], held, classes)
        if made is not None:
            t.facts[call.node] = held
            return made
    t.address(t.fixed(1, _COUNTED), call["self"], _COUNTED)
    return frozen(_COUNTED).type(t, call)


def _resize_one_hot(r: Resizer, call: Call) -> None:
    if r.fact is not None and r.changed(r.fact):
        call["num_classes"] = r.size(r.fact)


def _histogram(t: Typer, call: Call) -> Value:
    """Count how often each position of an axis occurs: bins of extent one from the first to the last."""
    held = t.positions.get(call["self"])
    if isinstance(held, Axis) and (call["bins"], call["min"], call["max"]) == (held.size, 0, held.size - 1):
        t.facts[call.node] = held
        return (held,)
    t.address(t.fixed(1, _COUNTED), call["self"], _COUNTED)
    return frozen(_COUNTED).type(t, call)


def _resize_histogram(r: Resizer, call: Call) -> None:
    if r.fact is not None and r.changed(r.fact):
        call["bins"] = r.size(r.fact)
        call["max"] = r.size(r.fact) - 1


def _zeros_of_counts(z: Zeros, call: Call) -> Atoms:
    """Find nothing counted for what was removed: it is not among the positions."""
    return frozenset(leaves(z.axes(call.node)[-1])) & z.atoms(call.node)


def _scatter(t: Typer, call: Call) -> Value:
    """Write slices: dimensions that stay whole are tied, the addressed one is frozen."""
    x, source = t[call["self"]], t[call["src"]]
    dim = call["dim"] % len(x)
    t.freeze(x[dim], "part of it is written")
    if call.name.startswith("aten.select_scatter"):
        rest = [a for d, a in enumerate(x) if d != dim]
        pairs = list(zip(rest, source, strict=True))
    else:
        t.freeze(source[dim], "part of it is written")
        pairs = [(a, b) for d, (a, b) in enumerate(zip(x, source, strict=True)) if d != dim]
    for a, b in pairs:
        t.unify(a, b)
    return x


def _zeros_of_scatter(z: Zeros, call: Call) -> Atoms:
    return z[call["self"]] & z[call["src"]]


def _zeros_of_embedding(z: Zeros, call: Call) -> Atoms:
    rank = len(z.axes(call.node))
    return z.where(call.node, z.at(call.node, call["weight"], (None, rank - 1)))


OPERATORS: dict[Any, Operator] = {
    aten.embedding.default: Operator(_embedding, _zeros_of_embedding, positions=no_positions),
    aten.index.Tensor: Operator(_index, zeros_of_first, positions=same_positions),
    aten.index_select.default: Operator(_index_select, zeros_of_first, positions=same_positions),
    aten.gather.default: Operator(_gather, zeros_of_first, positions=same_positions),
    aten.take_along_dim.default: Operator(
        _take_along, lambda z, call: z.some(call.node, call["self"]), positions=same_positions
    ),
    **table(
        Operator(_scatter_by_data, _zeros_of_scatter_by_data, positions=no_positions),
        *(
            "scatter.src",
            "scatter.value",
            "scatter_.src",
            "scatter_.value",
            "scatter_add.default",
            "scatter_add_.default",
        ),
    ),
    aten.one_hot.default: Operator(_one_hot, _zeros_of_counts, _resize_one_hot, no_positions),
    aten.histc.default: Operator(_histogram, _zeros_of_counts, _resize_histogram, no_positions),
    **table(
        Operator(_rigid),
        *("index_put.default", "index_put_.default"),
        *(
            "index_add.default",
            "index_add_.default",
            "masked_scatter.default",
        ),
        *("index_fill.int_Scalar", "index_copy.default"),
    ),
    **table(Operator(_scatter, _zeros_of_scatter), "slice_scatter.default", "select_scatter.default"),
    **table(
        frozen(_COUNTED),
        *("bincount.default", "nonzero.default", "unique_consecutive.default", "_unique2.default"),
        *("searchsorted.Tensor", "bucketize.Tensor", "masked_select.default", "cdist.default"),
    ),
}

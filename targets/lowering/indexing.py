"""Translate operators that read or write entries at positions which are data."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import Call, TensorSpec, tensor_spec
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import MAXIMUM, Emitter, Value, out_spec

aten = torch.ops.aten


def _positions(e: Emitter, index: fx.Node) -> str:
    return e.cast(e[index], tensor_spec(index).dtype, torch.int64)


def _embedding(e: Emitter, call: Call) -> Value:
    return e("Gather", e[call["weight"]], e[call["indices"]], axis=0)


def _index_select(e: Emitter, call: Call) -> Value:
    return e("Gather", e[call["self"]], e[call["index"]], axis=call["dim"] % max(len(call.spec("self").shape), 1))


def _gather(e: Emitter, call: Call) -> Value:
    return e("GatherElements", e[call["self"]], e[call["index"]], axis=call["dim"] % len(call.spec("self").shape))


def _take_along_dim(e: Emitter, call: Call) -> Value:
    if call["dim"] is None:
        raise UnsupportedOperatorError("take_along_dim without a dimension")
    spec, indices = call.spec("self"), call.spec("indices")
    dim = call["dim"] % len(spec.shape)
    for d in range(len(spec.shape)):
        if d != dim and (spec.shape[d] != indices.shape[d]):
            raise UnsupportedOperatorError("take_along_dim with indices that are broadcast")
    return e("GatherElements", e[call["self"]], e[call["indices"]], axis=dim)


class _Advanced:
    """Read ``x[indices]``, some of ``indices`` absent, as torch does: dimensions of the index stand where the indices
    stood, if those are next to each other, and first if they are not."""  # noqa: D205, D209

    def __init__(self, spec: TensorSpec, indices: list[fx.Node | None]) -> None:
        self.rank = len(spec.shape)
        self.tensors = [i for i in indices if i is not None]
        self.dims = [d for d, i in enumerate(indices) if i is not None]
        self.rest = [d for d in range(self.rank) if d not in self.dims]
        if any(tensor_spec(t).dtype is torch.bool for t in self.tensors):
            raise UnsupportedOperatorError("an index of booleans, whose number of entries depends on the data")
        self.index_rank = max(len(tensor_spec(t).shape) for t in self.tensors)
        together = self.dims == list(range(self.dims[0], self.dims[-1] + 1))
        self.place = self.dims[0] if together else 0

    @property
    def order(self) -> list[int]:
        """The dimensions of ``x``, indexed ones first."""
        return [*self.dims, *self.rest]

    def out_order(self) -> list[int]:
        """How the result, index dimensions first, is permuted into place."""
        index = list(range(self.index_rank))
        rest = list(range(self.index_rank, self.index_rank + len(self.rest)))
        return [*rest[: self.place], *index, *rest[self.place :]]

    def joined(self, e: Emitter) -> str:
        """Return the indices broadcast against each other and stacked in a last dimension."""
        names = [_positions(e, t) for t in self.tensors]
        ranks = [len(tensor_spec(t).shape) for t in self.tensors]
        names = [e.unsqueeze(n, *range(self.index_rank - r)) for n, r in zip(names, ranks, strict=True)]
        if len(names) > 1 and not self._same_shape():
            shapes = [e("Shape", n) for n in names]
            whole = shapes[0]
            for shape in shapes[1:]:
                whole = e("Max", whole, shape)
            names = [e("Expand", n, whole) for n in names]
        columns = [e.unsqueeze(n, self.index_rank) for n in names]
        return columns[0] if len(columns) == 1 else e("Concat", *columns, axis=self.index_rank)

    def _same_shape(self) -> bool:
        specs = [tensor_spec(t) for t in self.tensors]
        return len({spec.shape for spec in specs}) == 1 and not any(any(spec.dynamic) for spec in specs)


def _inverse(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def _index(e: Emitter, call: Call) -> Value:
    x, spec = e[call["self"]], call.spec("self")
    indices = list(call["indices"])
    if not any(i is not None for i in indices):
        return x
    way = _Advanced(spec, indices)
    if len(way.dims) == 1:
        return e("Gather", x, _positions(e, way.tensors[0]), axis=way.dims[0])
    found = e("GatherND", e.transpose(x, way.order), way.joined(e))
    return e.transpose(found, way.out_order())


def _index_put(e: Emitter, call: Call) -> Value:
    """Write (or add) values at positions: indexed dimensions come first, as for reading, and go back after."""
    x, spec = e[call["self"]], call.spec("self")
    way = _Advanced(spec, list(call["indices"]))
    joined = way.joined(e)
    moved = e.transpose(x, way.order)
    values = e.operand(call["values"], spec.dtype)
    # Values come in the result's order; ScatterND wants the index dimensions first, at full size.
    outer = e("Slice", e("Shape", joined), *(e.constant([n], torch.int64) for n in (0, way.index_rank, 0)))
    parts = [outer]
    if way.rest:
        inner = e("Gather", e("Shape", x), e.constant(way.rest, torch.int64), axis=0)
        parts.append(inner)
    whole = parts[0] if len(parts) == 1 else e("Concat", *parts, axis=0)
    order = way.out_order()
    rank = way.index_rank + len(way.rest)
    given = len(tensor_spec(call["values"]).shape)
    if order != list(range(rank)):
        values = e.unsqueeze(values, *range(rank - given))
        values = e.transpose(values, _inverse(order))
    updates = e("Expand", values, whole)
    reduction = "add" if call.has("accumulate") and call["accumulate"] else "none"
    return e.transpose(e("ScatterND", moved, joined, updates, reduction=reduction), _inverse(way.order))


def _scatter(reduction: str) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec, index = call.spec("self"), call.spec("index")
        name = e[call["index"]]
        if call.has("src"):
            source = e.operand(call["src"], spec.dtype)
            if call.spec("src").shape != index.shape:
                raise UnsupportedOperatorError("a scatter of a source that is larger than the index: cut it first")
        else:
            value = e.operand(call["value"], spec.dtype)
            source = e("Expand", value, e("Shape", name))
        kind = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}.get(
            call["reduce"] if call.has("reduce") else "", reduction
        )
        if call.has("include_self") and not call["include_self"]:
            raise UnsupportedOperatorError("a scatter that leaves out the tensor it writes to (include_self=False)")
        if call.has("reduce") and call["reduce"] == "mean":
            raise UnsupportedOperatorError("a scatter that averages")
        return e("ScatterElements", e[call["self"]], name, source, axis=call["dim"] % len(spec.shape), reduction=kind)

    return translate


def _one_hot(e: Emitter, call: Call) -> Value:
    classes = call["num_classes"]
    if classes < 0:
        raise UnsupportedOperatorError("one_hot without a number of classes: its size would depend on the data")
    spec = call.spec("self")
    chosen = e("Equal", e.unsqueeze(e[call["self"]], len(spec.shape)), e.constant(torch.arange(classes)))
    return e.cast(chosen, torch.bool, torch.int64)


def _write_slice(e: Emitter, call: Call) -> Value:
    """Translate ``x`` with a range of one dimension replaced: what is before, the source, what is after."""
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    x, source = e[call["self"]], e.operand(call["src"], spec.dtype)
    start = 0 if call["start"] is None else call["start"]
    stop = MAXIMUM if call["end"] is None else call["end"]
    if call["step"] != 1:
        if spec.dynamic[dim]:
            raise UnsupportedOperatorError("a write in steps to a dimension whose size depends on the inputs")
        first, last, step = slice(start, stop, call["step"]).indices(spec.shape[dim])
        return _at_positions(e, x, source, dim, len(spec.shape), torch.arange(first, last, step))
    reaches_end = isinstance(stop, int) and (stop == MAXIMUM or (not spec.dynamic[dim] and stop >= spec.shape[dim]))
    parts = [
        *([] if isinstance(start, int) and start == 0 else [e.slice(x, dim, 0, start)]),
        source,
        *([] if reaches_end else [e.slice(x, dim, stop, MAXIMUM)]),
    ]
    return parts[0] if len(parts) == 1 else e("Concat", *parts, axis=dim)


def _write_row(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dim, index = call["dim"] % len(spec.shape), call["index"]
    if not isinstance(index, int):
        raise UnsupportedOperatorError("a write to a row whose position depends on the inputs")
    source = e.unsqueeze(e.operand(call["src"], spec.dtype), dim)
    return _at_positions(e, e[call["self"]], source, dim, len(spec.shape), torch.tensor([index]))


def _at_positions(e: Emitter, x: str, source: str, dim: int, rank: int, places: torch.Tensor) -> str:
    order = [dim, *(d for d in range(rank) if d != dim)]
    written = e("ScatterND", e.transpose(x, order), e.constant(places[:, None]), e.transpose(source, order))
    return e.transpose(written, _inverse(order))


def _triangle(*, upper: bool) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        spec = call.spec("self")
        inner = torch.int64 if spec.dtype in (torch.int32, torch.uint8, torch.int8, torch.int16) else spec.dtype
        x = e.cast(e[call["self"]], spec.dtype, inner)
        return e.cast(e("Trilu", x, e.constant(call["diagonal"], torch.int64), upper=int(upper)), inner, spec.dtype)

    return translate


def _index_add(e: Emitter, call: Call) -> Value:
    spec, dtype = call.spec("self"), out_spec(call.node).dtype
    dim, rank = call["dim"] % len(spec.shape), len(spec.shape)
    source = e.operand(call["source"], dtype)
    if call["alpha"] != 1:
        source = e("Mul", source, e.constant(call["alpha"], dtype))
    order = [dim, *(d for d in range(rank) if d != dim)]
    places = e.unsqueeze(_positions(e, call["index"]), 1)
    written = e("ScatterND", e.transpose(e[call["self"]], order), places, e.transpose(source, order), reduction="add")
    return e.transpose(written, _inverse(order))


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(_embedding, "embedding.default"),
    **_table(_index_select, "index_select.default"),
    **_table(_gather, "gather.default"),
    **_table(_take_along_dim, "take_along_dim.default"),
    **_table(_index, "index.Tensor", "_unsafe_index.Tensor"),
    **_table(_index_put, "index_put.default", "_unsafe_index_put.default"),
    **_table(_index_add, "index_add.default"),
    **_table(_scatter("none"), "scatter.src", "scatter.value"),
    **_table(_scatter("add"), "scatter_add.default"),
    **_table(_scatter("none"), "scatter_reduce.two"),
    **_table(_one_hot, "one_hot.default"),
    **_table(_write_slice, "slice_scatter.default"),
    **_table(_write_row, "select_scatter.default"),
    **_table(_triangle(upper=False), "tril.default"),
    **_table(_triangle(upper=True), "triu.default"),
}

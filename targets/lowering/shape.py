"""Translate operators that rearrange entries: views, permutations, joins and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import SPEC, Call, TensorSpec, tensor_spec
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import MAXIMUM, Emitter, Value, dims_of, out_spec

aten = torch.ops.aten


# -- views --


def settled(entries: Sequence[Any], spec: TensorSpec) -> list[Any]:
    """Return the entries of a shape with every size that the result's type knows as an integer."""
    return [entry if dynamic else size for entry, size, dynamic in zip(entries, spec.shape, spec.dynamic, strict=True)]


def _view(e: Emitter, call: Call) -> Value:
    x, spec, result = e[call["self"]], call.spec("self"), out_spec(call.node)
    if spec.shape == result.shape and spec.dynamic == result.dynamic and sum(spec.dynamic) < 2:
        return x
    return e.reshape(x, spec, settled(call["size" if call.has("size") else "shape"], result))


def _view_dtype(e: Emitter, call: Call) -> Value:
    if call["dtype"] != call.spec("self").dtype:
        raise UnsupportedOperatorError("reading the bits of one type as another")
    return e[call["self"]]


def _view_as(e: Emitter, call: Call) -> Value:
    other = e.shape(e[call["other"]], call.spec("other"))
    return e.reshape(e[call["self"]], call.spec("self"), other)


def _flatten(e: Emitter, call: Call) -> Value:
    x, spec = e[call["self"]], call.spec("self")
    rank = len(spec.shape)
    if rank == 0:
        return e.unsqueeze(x, 0)
    start, end = call["start_dim"] % rank, call["end_dim"] % rank
    if start == end:
        return x
    sizes = e.shape(x, spec)
    merged = out_spec(call.node)
    middle = -1 if merged.dynamic[start] else merged.shape[start]
    return e.reshape(x, spec, [*sizes[:start], middle, *sizes[end + 1 :]])


def _unflatten(e: Emitter, call: Call) -> Value:
    x, spec = e[call["self"]], call.spec("self")
    dim = call["dim"] % len(spec.shape)
    sizes = e.shape(x, spec)
    return e.reshape(x, spec, settled([*sizes[:dim], *call["sizes"], *sizes[dim + 1 :]], out_spec(call.node)))


def _squeeze(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    wanted = dims_of(call["dim"] if call.has("dim") else None, len(spec.shape))
    return e.squeeze(e[call["self"]], *(d for d in wanted if spec.shape[d] == 1 and not spec.dynamic[d]))


def _unsqueeze(e: Emitter, call: Call) -> Value:
    return e.unsqueeze(e[call["self"]], call["dim"] % len(out_spec(call.node).shape))


def _expand(e: Emitter, call: Call) -> Value:
    return broadcast_to(e, call["self"], call["size"])


def broadcast_to(e: Emitter, x: fx.Node, size: Sequence[Any]) -> str:
    """Broadcast a tensor; only dimensions of size 1 (and new ones) have to be named."""
    spec = tensor_spec(x)
    new = len(size) - len(spec.shape)
    target: list[Any] = list(size[:new])
    for dim, entry in enumerate(size[new:]):
        grows = spec.shape[dim] == 1 and not spec.dynamic[dim] and not (isinstance(entry, int) and entry in (-1, 1))
        target.append(entry if grows else 1)
    if not new and all(isinstance(entry, int) and entry == 1 for entry in target):
        return e[x]
    return e.expand(e[x], target)


def _expand_as(e: Emitter, call: Call) -> Value:
    return broadcast_to(e, call["self"], e.shape(e[call["other"]], call.spec("other")))


def _broadcast_tensors(e: Emitter, call: Call) -> Value:
    tensors = call["tensors"]
    specs = call.node.meta[SPEC]
    target: list[Any] = []
    for dim in range(len(specs[0].shape)):
        size: int | str = specs[0].shape[dim]
        for each in tensors:
            spec = tensor_spec(each)
            own = dim - len(specs[0].shape) + len(spec.shape)
            if specs[0].dynamic[dim] and own >= 0 and spec.dynamic[own]:
                size = e.extent(e[each], spec, own)
        target.append(size)
    return [broadcast_to(e, each, target) for each in tensors]


# -- permutations --


def _permute(e: Emitter, call: Call) -> Value:
    rank = len(call.spec("self").shape)
    return e.transpose(e[call["self"]], [d % rank for d in call["dims"]])


def swapped(e: Emitter, name: str, rank: int, first: int, second: int) -> str:
    """Exchange two dimensions."""
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return e.transpose(name, order)


def _transpose(e: Emitter, call: Call) -> Value:
    rank = len(call.spec("self").shape)
    names = ("dim0", "dim1") if call.has("dim0") else ("axis0", "axis1")
    return swapped(e, e[call["self"]], rank, *(call[n] % max(rank, 1) for n in names))


def _transpose_last(e: Emitter, call: Call) -> Value:
    rank = len(call.spec("self").shape)
    return e[call["self"]] if rank < 2 else swapped(e, e[call["self"]], rank, rank - 2, rank - 1)


def _reverse_dims(e: Emitter, call: Call) -> Value:
    return e.transpose(e[call["self"]], list(range(len(call.spec("self").shape)))[::-1])


def _movedim(e: Emitter, call: Call) -> Value:
    rank = len(call.spec("self").shape)
    source, destination = (dims_of(call[name], rank) for name in ("source", "destination"))
    rest = iter(d for d in range(rank) if d not in source)
    placed = dict(zip(destination, source, strict=True))
    return e.transpose(e[call["self"]], [placed[d] if d in placed else next(rest) for d in range(rank)])


def _flip(e: Emitter, call: Call) -> Value:
    dims = dims_of(call["dims"], len(call.spec("self").shape))
    if not call["dims"]:
        return e[call["self"]]
    ends = [e.constant([value] * len(dims), torch.int64) for value in (-1, -MAXIMUM)]
    return e("Slice", e[call["self"]], *ends, e.constant(dims, torch.int64), e.constant([-1] * len(dims), torch.int64))


def _roll(e: Emitter, call: Call) -> Value:
    x, spec = e[call["self"]], call.spec("self")
    dims, shifts = call["dims"], call["shifts"]
    if not dims:
        flat = e.reshape(x, spec, [-1])
        whole = e.shape(x, spec)
        return e.reshape(rolled(e, flat, 0, shifts[0]), TensorSpec((0,), spec.dtype, (True,)), whole)
    for dim, shift in zip(dims, shifts, strict=True):
        x = rolled(e, x, dim % len(spec.shape), shift)
    return x


def rolled(e: Emitter, x: str, dim: int, shift: Any) -> str:
    """Rotate one dimension: what leaves at the end comes back at the start."""
    if not isinstance(shift, int):
        raise UnsupportedOperatorError("a roll by a number that depends on the inputs")
    if shift == 0:
        return x
    return e("Concat", e.slice(x, dim, -shift, MAXIMUM), e.slice(x, dim, 0, -shift), axis=dim)


# -- joins --


def _cat(e: Emitter, call: Call) -> Value:
    spec = out_spec(call.node)
    tensors = [t for t in call["tensors"] if tensor_spec(t).shape != (0,)]
    if not tensors:
        return e[call["tensors"][0]]
    names = [e.cast(e[t], tensor_spec(t).dtype, spec.dtype) for t in tensors]
    return names[0] if len(names) == 1 else e("Concat", *names, axis=call["dim"] % len(spec.shape))


def _stack(e: Emitter, call: Call) -> Value:
    spec = out_spec(call.node)
    dim = call["dim"] % len(spec.shape)
    names = [e.unsqueeze(e.cast(e[t], tensor_spec(t).dtype, spec.dtype), dim) for t in call["tensors"]]
    return names[0] if len(names) == 1 else e("Concat", *names, axis=dim)


def _repeat(e: Emitter, call: Call) -> Value:
    repeats, spec = call["repeats"], call.spec("self")
    new = len(repeats) - len(spec.shape)
    x = e.unsqueeze(e[call["self"]], *range(new))
    if all(isinstance(r, int) and r == 1 for r in repeats):
        return x
    ones = all(
        (isinstance(r, int) and r == 1) or (dim < new or (spec.shape[dim - new] == 1 and not spec.dynamic[dim - new]))
        for dim, r in enumerate(repeats)
    )
    return e.expand(x, repeats) if ones else e("Tile", x, e.sizes(repeats))


def _tile(e: Emitter, call: Call) -> Value:
    dims, rank = call["dims"], len(call.spec("self").shape)
    x = e.unsqueeze(e[call["self"]], *range(max(len(dims) - rank, 0)))
    return e("Tile", x, e.sizes([1] * max(rank - len(dims), 0) + list(dims)))


def _repeat_interleave(e: Emitter, call: Call) -> Value:
    """Repeat each entry in place: a new dimension is broadcast and merged."""
    x, spec, result = e[call["self"]], call.spec("self"), out_spec(call.node)
    dim, repeats = call["dim"], call["repeats"]
    if dim is None:
        x = e.reshape(x, spec, [-1])
        spec, dim = TensorSpec((0,), spec.dtype, (True,)), 0
    dim %= len(spec.shape)
    wide = e.expand(e.unsqueeze(x, dim + 1), [1] * (dim + 1) + [repeats] + [1] * (len(spec.shape) - dim - 1))
    sizes: list[Any] = e.shape(x, spec) if spec.shape != (0,) else [0]
    sizes[dim] = -1 if result.dynamic[dim] else result.shape[dim]
    between = TensorSpec(
        (*spec.shape[: dim + 1], 0, *spec.shape[dim + 1 :]),
        spec.dtype,
        (*spec.dynamic[: dim + 1], True, *spec.dynamic[dim + 1 :]),
    )
    return e.reshape(wide, between, sizes)


def _meshgrid(e: Emitter, call: Call) -> Value:
    tensors = list(call["tensors"])
    exchanged = call.has("indexing") and call["indexing"] == "xy" and len(tensors) > 1
    if exchanged:
        tensors[0], tensors[1] = tensors[1], tensors[0]
    rank = len(tensors)
    sizes = [e.extent(e[t], tensor_spec(t), 0) if tensor_spec(t).shape else 1 for t in tensors]
    grids = []
    for dim, tensor in enumerate(tensors):
        shape = [1] * rank
        shape[dim] = -1
        column = e("Reshape", e[tensor], e.sizes(shape))
        grids.append(e.expand(column, [1 if d == dim else size for d, size in enumerate(sizes)]))
    if exchanged:
        grids[0], grids[1] = grids[1], grids[0]
    return list(grids)


# -- cuts --


def _slice(e: Emitter, call: Call) -> Value:
    x, spec = e[call["self"]], call.spec("self")
    dim = call["dim"] % len(spec.shape)
    start = 0 if call["start"] is None else call["start"]
    stop = MAXIMUM if call["end"] is None else call["end"]
    step = call["step"]
    whole = isinstance(start, int) and start == 0 and isinstance(stop, int) and step == 1
    if whole and (stop == MAXIMUM or (not spec.dynamic[dim] and stop >= spec.shape[dim])):
        return x
    return e.slice(x, dim, start, stop, step)


def _select(e: Emitter, call: Call) -> Value:
    index = call["index"]
    position = e.squeeze(e.size(index), 0) if isinstance(index, fx.Node) else e.constant(index, torch.int64)
    return e("Gather", e[call["self"]], position, axis=call["dim"] % len(call.spec("self").shape))


def _narrow(e: Emitter, call: Call) -> Value:
    start, length = call["start"], call["length"]
    if isinstance(start, fx.Node) or isinstance(length, fx.Node):
        stop: Any = e("Add", e.size(start), e.size(length))
    else:
        size = call.spec("self").shape[call["dim"]]
        start = start + size if start < 0 else start
        stop = start + length
    return e.slice(e[call["self"]], call["dim"] % len(call.spec("self").shape), start, stop)


def _unbind(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    count = spec.shape[dim]
    if spec.dynamic[dim]:
        raise UnsupportedOperatorError("unbinding a dimension whose size depends on the inputs")
    if count == 1:
        return [e.squeeze(e[call["self"]], dim)]
    return [e.squeeze(part, dim) for part in _parts(e, e[call["self"]], dim, [1] * count)]


def _parts(e: Emitter, name: str, dim: int, sizes: Sequence[Any]) -> tuple[str, ...]:
    if len(sizes) == 1:
        return (name,)
    return e.several("Split", len(sizes), name, e.sizes(sizes), axis=dim)


def _split(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    results = call.node.meta[SPEC]
    if not spec.dynamic[dim]:
        return _parts(e, e[call["self"]], dim, [each.shape[dim] for each in results])
    if call.has("split_sizes"):
        return _parts(e, e[call["self"]], dim, call["split_sizes"])
    if call.has("chunks"):
        return e.several("Split", len(results), e[call["self"]], axis=dim, num_outputs=len(results))
    size = call["split_size"]
    if not isinstance(size, int):
        raise UnsupportedOperatorError("a split into parts whose number depends on the inputs")
    name = e[call["self"]]
    last = len(results) - 1
    return [e.slice(name, dim, i * size, MAXIMUM if i == last else (i + 1) * size) for i in range(len(results))]


def _tensor_split(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    dim = call["dim"] % len(spec.shape)
    if spec.dynamic[dim]:
        raise UnsupportedOperatorError("a split of a dimension whose size depends on the inputs")
    return _parts(e, e[call["self"]], dim, [each.shape[dim] for each in call.node.meta[SPEC]])


def _unfold(e: Emitter, call: Call) -> Value:
    """Cut windows out of a dimension: ``(…, n, …) -> (…, windows, …, size)``."""
    spec = call.spec("self")
    dim = call["dimension"] % len(spec.shape)
    if spec.dynamic[dim]:
        raise UnsupportedOperatorError("windows over a dimension whose size depends on the inputs")
    size, step = call["size"], call["step"]
    starts = torch.arange(0, spec.shape[dim] - size + 1, step)
    found = e("Gather", e[call["self"]], e.constant(starts[:, None] + torch.arange(size)), axis=dim)
    rank = len(spec.shape) + 1
    return e.transpose(found, [d for d in range(rank) if d != dim + 1] + [dim + 1])


# -- rearranged channels --


def _pixel_shuffle(e: Emitter, call: Call) -> Value:
    """Move channels into space: ``(n, c r r, h, w) -> (n, c, h r, w r)``."""
    spec = call.spec("self")
    if len(spec.shape) != 4:
        raise UnsupportedOperatorError(f"a pixel shuffle of {len(spec.shape)} dimensions; only 4 are supported")
    return e("DepthToSpace", e[call["self"]], blocksize=call["upscale_factor"], mode="CRD")


def _pixel_unshuffle(e: Emitter, call: Call) -> Value:
    """Move space into channels: ``(n, c, h r, w r) -> (n, c r r, h, w)``."""
    x, spec, result = e[call["self"]], call.spec("self"), out_spec(call.node)
    factor = call["downscale_factor"]
    if len(spec.shape) != 4 or any(spec.dynamic[1:]):
        raise UnsupportedOperatorError(
            "a pixel unshuffle of other than 4 dimensions, or of a size unknown before run time"
        )
    n, (c, h, w) = e.extent(x, spec, 0), spec.shape[1:]
    split = e.reshape(x, spec, [n, c, h // factor, factor, w // factor, factor])
    between = TensorSpec((0,) * 6, spec.dtype, (spec.dynamic[0],) + (False,) * 5)
    moved = e.transpose(split, [0, 1, 3, 5, 2, 4])
    return e.reshape(moved, between, [-1 if result.dynamic[0] else result.shape[0], *result.shape[1:]])


def _channel_shuffle(e: Emitter, call: Call) -> Value:
    """Deal channels out to the groups in turn: ``(n, g c, …) -> (n, c g, …)``."""
    x, spec = e[call["self"]], call.spec("self")
    groups, sizes = call["groups"], e.shape(x, spec)
    split = e.reshape(x, spec, [sizes[0], groups, spec.shape[1] // groups, *sizes[2:]])
    rank = len(spec.shape) + 1
    moved = swapped(e, split, rank, 1, 2)
    between = TensorSpec((0,) * rank, spec.dtype, (True,) * rank)
    return e.reshape(moved, between, [*sizes])


def _diagonal(e: Emitter, call: Call) -> Value:
    spec = call.spec("self")
    first, second = (call[name] % len(spec.shape) for name in ("dim1", "dim2"))
    if spec.dynamic[first] or spec.dynamic[second]:
        raise UnsupportedOperatorError("a diagonal of dimensions whose size depends on the inputs")
    rank = len(spec.shape)
    moved = e.transpose(e[call["self"]], [first, second, *(d for d in range(rank) if d not in (first, second))])
    count = out_spec(call.node).shape[-1]
    offset = call["offset"]
    rows = torch.arange(count) + max(-offset, 0)
    found = e("GatherND", moved, e.constant(torch.stack([rows, rows + offset], 1)))
    return e.transpose(found, [*range(1, rank - 1), 0])


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(
        _view, "view.default", "reshape.default", "_unsafe_view.default", "view_copy.default", "_reshape_copy.default"
    ),
    **_table(_view_dtype, "view.dtype"),
    **_table(_view_as, "view_as.default", "reshape_as.default"),
    **_table(_flatten, "flatten.using_ints"),
    **_table(_unflatten, "unflatten.int"),
    **_table(_squeeze, "squeeze.default", "squeeze.dim", "squeeze.dims"),
    **_table(_unsqueeze, "unsqueeze.default"),
    **_table(_expand, "expand.default", "broadcast_to.default"),
    **_table(_expand_as, "expand_as.default"),
    **_table(_broadcast_tensors, "broadcast_tensors.default"),
    **_table(_permute, "permute.default"),
    **_table(_transpose, "transpose.int", "swapaxes.default", "swapdims.default"),
    **_table(_transpose_last, "t.default", "mT.default", "adjoint.default"),
    **_table(_reverse_dims, "numpy_T.default"),
    **_table(_movedim, "movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist"),
    **_table(_flip, "flip.default"),
    **_table(_roll, "roll.default"),
    **_table(_cat, "cat.default", "concat.default", "concatenate.default"),
    **_table(_stack, "stack.default"),
    **_table(_repeat, "repeat.default"),
    **_table(_tile, "tile.default"),
    **_table(_repeat_interleave, "repeat_interleave.self_int"),
    **_table(_meshgrid, "meshgrid.default", "meshgrid.indexing"),
    **_table(_slice, "slice.Tensor"),
    **_table(_select, "select.int"),
    **_table(_narrow, "narrow.default"),
    **_table(_unbind, "unbind.int"),
    **_table(_split, "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default"),
    **_table(_tensor_split, "tensor_split.sections", "tensor_split.indices"),
    **_table(_unfold, "unfold.default"),
    **_table(_pixel_shuffle, "pixel_shuffle.default"),
    **_table(_pixel_unshuffle, "pixel_unshuffle.default"),
    **_table(_channel_shuffle, "channel_shuffle.default"),
    **_table(_diagonal, "diagonal.default"),
}

"""Operators that move entries without computing: views, permutations, concatenation, slicing, expansion."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from graphopt.axes.algebra import ONE, is_frozen, product
from graphopt.axes.infer import NO_ATOMS, Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import Window, drop, join, pad, permute, reshape, sections, spread, tile, window
from graphopt.dialects.aten.common import table
from graphopt.dialects.common import (
    ITEM,
    NUMBER,
    PASS,
    bounds,
    check_cuts,
    dims_of,
    fixed_space,
    hints,
    moved_bounds,
    new_shape,
    no_positions,
    part_sizes,
    parts_of,
    positions_of_each,
    positions_of_item,
    repeated,
    same_positions,
    zeros_of_first,
)
from graphopt.graph import Call, hint, tensor_spec

aten = torch.ops.aten

# -- views ----------------------------------------------------------------------------------------------------------


def _view(t: Typer, call: Call) -> Value:
    return reshape(t, t[call.node.args[0]], t.shape())


def _resize_view(name: str) -> Any:
    """Rewrite the shape; a strict view becomes a reshape, for a sliced tensor may have other strides."""

    def resize(r: Resizer, call: Call) -> None:
        shape = new_shape(r, call, call[name], r.axes(call.node))
        if call.node.target in (aten.view.default, aten._unsafe_view.default):
            source = call.node.args[0]
            call.node.target = aten.reshape.default
            call.node.args = (source, shape)
            call.node.kwargs = {}
        else:
            call[name] = shape

    return resize


def _unflatten_resize(r: Resizer, call: Call) -> None:
    axes = r.axes(call.node)
    dim = call["dim"] % len(r.axes(call["self"]))
    sizes = call["sizes"]
    call["sizes"] = r.entries(call, sizes, axes[dim : dim + len(sizes)])


def _permute(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    return permute(x, [d % len(x) for d in call["dims"]])


def _swap(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    first, second = ("dim0", "dim1") if call.has("dim0") else ("axis0", "axis1")
    order = list(range(len(x)))
    a, b = call[first] % len(x), call[second] % len(x)
    order[a], order[b] = order[b], order[a]
    return permute(x, order)


def _reverse(t: Typer, call: Call) -> Value:
    return t[call["self"]][::-1]


def _swap_last_two(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    return (*x[:-2], x[-1], x[-2])


def _move(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    source, target = dims_of(call["source"], len(x)), dims_of(call["destination"], len(x))
    order = [d for d in range(len(x)) if d not in source]
    for to, d in sorted(zip(target, source, strict=True)):
        order.insert(to, d)
    return permute(x, order)


def _unsqueeze(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % (len(x) + 1)
    return (*x[:dim], ONE, *x[dim:])


def _squeeze(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dims = dims_of(call["dim"], len(x)) if call.has("dim") else list(range(len(x)))
    spec = call.spec("self")
    return drop(x, [d for d in dims if spec.shape[d] == 1 and not spec.dynamic[d]], keepdim=False)


# -- expansion ------------------------------------------------------------------------------------------------------


def _expand(t: Typer, call: Call) -> Value:
    return spread(t, t[call["self"]], t.shape(), call.out.dynamic)


def _resize_expand(r: Resizer, call: Call) -> None:
    call["size"] = r.entries(call, call["size"], r.axes(call.node))


def _zeros_of_spread(z: Zeros, call: Call) -> Atoms:
    """Zero where the source is; what it was spread along may hold its indices, too."""
    return z.some(call.node, call["self"])


def _expand_as(t: Typer, call: Call) -> Value:
    x, other = t[call["self"]], t[call["other"]]
    padded = (ONE,) * (len(other) - len(x)) + x
    return tuple(o if a is ONE else t.unify(a, o) for a, o in zip(padded, other, strict=True))


def _reshape_as(t: Typer, call: Call) -> Value:
    out = reshape(t, t[call["self"]], t.shape())
    for a, b in zip(out, t[call["other"]], strict=True):
        t.unify(a, b)
    return out


def _loosen(r: Resizer, call: Call) -> None:
    """Replace a strict view like another tensor: a sliced tensor may have other strides."""
    call.node.target = aten.reshape_as.default


def _repeat(t: Typer, call: Call) -> Value:
    out, counts = tile(t, t[call["self"]], hints(call["repeats"]))
    return repeated(t, call, out, counts, len(counts))


def _resize_repeat(r: Resizer, call: Call) -> None:
    call["repeats"] = r.entries(call, call["repeats"], r.fact)


def _tile(t: Typer, call: Call) -> Value:
    """Repeat; dimensions for which no number is given are repeated once."""
    x = t[call["self"]]
    dims = hints(call["dims"])
    out, counts = tile(t, x, [*[1] * (len(x) - len(dims)), *dims])
    return repeated(t, call, out, counts, len(dims))


def _resize_tile(r: Resizer, call: Call) -> None:
    call["dims"] = r.entries(call, call["dims"], r.fact)


def _repeat_interleave(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    if call["dim"] is None:
        for a in x:
            t.freeze(a, "repeated flat")
        return t.opaque(t.shape(), "repeated flat")
    dim = call["dim"] % len(x)
    count = t.fresh(hint(call["repeats"]))
    t.facts[call.node] = count
    return (*x[:dim], product((x[dim], count)), *x[dim + 1 :])


def _resize_repeat_interleave(r: Resizer, call: Call) -> None:
    call["repeats"] = r.entry(call, call["repeats"], r.fact)
    if call["output_size"] is not None:
        dim = call["dim"] % len(r.axes(call["self"]))
        call["output_size"] = r.entry(call, call["output_size"], r.axes(call.node)[dim])


# -- joining and cutting --------------------------------------------------------------------------------------------


def _cat(t: Typer, call: Call) -> Value:
    tensors = [n for n in call["tensors"] if tensor_spec(n).shape != (0,)]
    return join(t, [t[n] for n in tensors], call["dim"])


def _side_by_side(t: Typer, call: Call) -> Value:
    tensors = [t[n] for n in call["tensors"]]
    return join(t, tensors, min(1, len(tensors[0]) - 1))


def _zeros_of_cat(z: Zeros, call: Call) -> Atoms:
    return z.joined(call["tensors"])


def _stack(t: Typer, call: Call) -> Value:
    tensors = call["tensors"]
    first = t[tensors[0]]
    for other in tensors[1:]:
        for a, b in zip(first, t[other], strict=True):
            t.unify(a, b)
    dim = call["dim"] % (len(first) + 1)
    return (*first[:dim], t.fixed(len(tensors), "stacked values"), *first[dim:])


def _split(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    sizes = part_sizes(call, dim)
    if is_frozen(x[dim]):
        return [(*x[:dim], t.fixed(n, "part of a frozen axis"), *x[dim + 1 :]) for n in sizes]
    check_cuts(t, call.spec("self"), x[dim], dim, accumulate(sizes))
    return list(sections(t, x, dim, sizes))


def _resize_split(r: Resizer, call: Call) -> None:
    """Spell the part sizes out: after a pruning the parts need not be equal."""
    x = r.axes(call["self"])
    dim = call["dim"] % len(x)
    axes = parts_of(r, call, dim)
    if not any(r.changed(a) for a in axes):
        return
    source, sizes = call["self"], [r.size(a) for a in axes]
    if any(part.dynamic[dim] for part in call.node.meta["spec"]):
        given = next((call[name] for name in ("split_sizes", "split_size") if call.has(name)), None)
        if isinstance(given, list | tuple):
            sizes = r.entries(call, given, axes)
        else:
            # Equal parts of a dynamic axis: they are as many for any batch, and shrink alike.
            if given is not None:
                call["split_size"] = r.entry(call, given, axes[0])
            return
    call.node.target = aten.split_with_sizes.default
    call.node.args = (source, sizes, dim)
    call.node.kwargs = {}


def _cut_at(t: Typer, call: Call) -> Value:
    """Type a split at given positions; those of a dynamic dimension could not follow it."""
    dim = call["dim"] % len(call.spec("self").shape)
    if call.spec("self").dynamic[dim]:
        t.freeze(t[call["self"]][dim], "a dynamic dimension is cut")
    return _split(t, call)


def _unbind(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    t.freeze(x[dim], "its entries are used one by one")
    return [(*x[:dim], *x[dim + 1 :]) for _ in range(x[dim].size)]


def _select(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    t.freeze(x[dim], "one of its entries is taken by number")
    return drop(x, [dim], keepdim=False)


def _slice(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    (start, stop), step = bounds(call["start"], call["end"], x[dim].size), hint(call["step"])
    if (start, stop, step) == (0, x[dim].size, 1):
        return x
    check_cuts(t, call.spec("self"), x[dim], dim, (start, stop))
    part = window(t, x[dim], start, stop, step)
    t.facts[call.node] = part
    return (*x[:dim], part.taken, *x[dim + 1 :])


def _resize_slice(r: Resizer, call: Call) -> None:
    part = r.fact
    if not isinstance(part, Window):
        return
    call["start"], call["end"] = moved_bounds(r, call, part, call["start"], call["end"], hint(call["step"]))


def _narrow(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    start = hint(call["start"]) % x[dim].size
    stop = start + hint(call["length"])
    check_cuts(t, call.spec("self"), x[dim], dim, (start, stop))
    part = window(t, x[dim], start, stop, 1)
    t.facts[call.node] = part
    return (*x[:dim], part.taken, *x[dim + 1 :])


def _resize_narrow(r: Resizer, call: Call) -> None:
    part = r.fact
    if not (isinstance(call["start"], int) and call["start"] < 0):
        call["start"] = r.entry(call, call["start"], part.before)
    elif r.changed(part.taken) or r.changed(part.after):
        call["start"] = -r.size(part.taken) - r.size(part.after)
    call["length"] = r.entry(call, call["length"], part.taken)


def _pad(t: Typer, call: Call) -> Value:
    mode = call["mode"] if call.has("mode") else "constant"
    return pad(t, t[call["self"]], hints(call["pad"]), t.shape(), constant=mode == "constant")


def _zeros_of_pad(z: Zeros, call: Call) -> Atoms:
    return z[call["self"]] if call["value"] in (None, 0) else NO_ATOMS


def _shift(why: str, name: str) -> Operator:
    """Make an operator that moves entries along some dimensions and so fixes their order."""

    def type_(t: Typer, call: Call) -> Value:
        x = t[call["self"]]
        for d in dims_of(call[name], len(x)):
            t.freeze(x[d], why)
        return x

    return Operator(type_, zeros_of_first)


def _triangle(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    for axis in x[-2:]:
        t.freeze(axis, "a triangle of it is taken")
    return x


def _diagonal(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dims = [call["dim1"] % len(x), call["dim2"] % len(x)]
    for d in dims:
        t.freeze(x[d], "a diagonal is taken")
    return (*drop(x, dims, keepdim=False), t.fixed(t.shape()[-1], "a diagonal"))


def _unfold(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    dim = call["dimension"] % len(x)
    t.freeze(x[dim], "windows are taken over it")
    shape = t.shape()
    return (*x[:dim], t.fixed(shape[dim], "windows"), *x[dim + 1 :], t.fixed(shape[-1], "a window"))


def _gate(t: Typer, call: Call) -> Value:
    """Type ``a * sigmoid(b)`` of the two halves ``a | b``, which share their indices."""
    x = t[call["self"]]
    dim = call["dim"] % len(x)
    half = x[dim].size // 2
    first, second = sections(t, x, dim, [half, half])
    t.unify(first[dim], second[dim])
    return first


# -- channels into space and back -----------------------------------------------------------------------------------


def _pixel_shuffle(t: Typer, call: Call) -> Value:
    """``(n, c r r, h, w) -> (n, c, h r, w r)``: the r x r sub-positions are fixed."""
    x = fixed_space(t, t[call["self"]], 2)
    factor = call["upscale_factor"]
    channels, places = t.split(x[-3], x[-3].size // factor**2)
    t.freeze(places, "a sub-position in space")
    return (*x[:-3], channels, *t.opaque(t.shape()[-2:], "a spatial dimension"))


def _pixel_unshuffle(t: Typer, call: Call) -> Value:
    x = fixed_space(t, t[call["self"]], 2)
    places = t.fixed(call["downscale_factor"] ** 2, "a sub-position in space")
    return (*x[:-3], product((x[-3], places)), *t.opaque(t.shape()[-2:], "a spatial dimension"))


def _channel_shuffle(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    rows, columns = t.split(x[1], call["groups"])
    t.freeze(rows, "the number of shuffled groups")
    return (x[0], product((columns, rows)), *x[2:])


def _im2col(t: Typer, call: Call) -> Value:
    x = fixed_space(t, t[call["self"]], 2)
    patch = t.fixed(prod(call["kernel_size"]), "a patch's position")
    return (*x[:-3], product((x[-3], patch)), t.fixed(t.shape()[-1], "patches"))


def _col2im(t: Typer, call: Call) -> Value:
    x = fixed_space(t, t[call["self"]], 1)
    channels, patch = t.split(x[-2], x[-2].size // prod(call["kernel_size"]))
    t.freeze(patch, "a patch's position")
    return (*x[:-2], channels, *t.opaque(t.shape()[-2:], "a spatial dimension"))


def _as_complex(t: Typer, call: Call) -> Value:
    x = t[call["self"]]
    t.freeze(x[-1], "real and imaginary part")
    return x[:-1]


def _as_real(t: Typer, call: Call) -> Value:
    return (*t[call["self"]], t.fixed(2, "real and imaginary part"))


_VIEW = Operator(_view, zeros_of_first, _resize_view("size"))
_MOVE = Operator(_permute, zeros_of_first)
_SWAP = Operator(_swap, zeros_of_first)
_SPLIT = Operator(_split, zeros_of_first, _resize_split)

_ENTRIES: dict[Any, Operator] = {
    **table(_VIEW, "view.default", "_unsafe_view.default"),
    aten.reshape.default: Operator(_view, zeros_of_first, _resize_view("shape")),
    **table(Operator(_view, zeros_of_first), "flatten.using_ints", "ravel.default"),
    aten.unflatten.int: Operator(_view, zeros_of_first, _unflatten_resize),
    aten.reshape_as.default: Operator(_reshape_as, zeros_of_first),
    aten.view_as.default: Operator(_reshape_as, zeros_of_first, _loosen),
    **table(_MOVE, "permute.default"),
    **table(_SWAP, "transpose.int", "swapaxes.default", "transpose_.default", "swapdims.default"),
    **table(Operator(_reverse, zeros_of_first), "t.default", "numpy_T.default"),
    aten.mT.default: Operator(_swap_last_two, zeros_of_first),
    **table(Operator(_move, zeros_of_first), "movedim.intlist", "movedim.int", "moveaxis.int", "moveaxis.intlist"),
    **table(Operator(_unsqueeze, zeros_of_first), "unsqueeze.default", "unsqueeze_.default"),
    **table(Operator(_squeeze, zeros_of_first), "squeeze.default", "squeeze.dim", "squeeze.dims", "squeeze_.dim"),
    aten.expand.default: Operator(_expand, _zeros_of_spread, _resize_expand),
    aten.expand_as.default: Operator(_expand_as, _zeros_of_spread),
    aten.broadcast_to.default: Operator(_expand, _zeros_of_spread, _resize_expand),
    aten.repeat.default: Operator(_repeat, _zeros_of_spread, _resize_repeat),
    aten.tile.default: Operator(_tile, _zeros_of_spread, _resize_tile),
    aten.repeat_interleave.self_int: Operator(_repeat_interleave, _zeros_of_spread, _resize_repeat_interleave),
    **table(Operator(_cat, _zeros_of_cat), "cat.default", "concat.default", "concatenate.default"),
    aten.hstack.default: Operator(_side_by_side, _zeros_of_cat),
    aten.stack.default: Operator(_stack, _zeros_of_cat),
    **table(
        _SPLIT, "split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default", "tensor_split.sections"
    ),
    aten.tensor_split.indices: Operator(_cut_at, zeros_of_first, _resize_split),
    aten.unbind.int: Operator(_unbind, zeros_of_first),
    aten.select.int: Operator(_select, zeros_of_first),
    aten.slice.Tensor: Operator(_slice, zeros_of_first, _resize_slice),
    aten.narrow.default: Operator(_narrow, zeros_of_first, _resize_narrow),
    **table(Operator(_pad, _zeros_of_pad), "pad.default", "constant_pad_nd.default"),
    aten.glu.default: Operator(_gate, zeros_of_first),
    aten.roll.default: _shift("rolled along it", "dims"),
    aten.flip.default: _shift("reversed along it", "dims"),
    **table(Operator(_triangle, zeros_of_first), "tril.default", "triu.default", "tril_.default", "triu_.default"),
    aten.diagonal.default: Operator(_diagonal, zeros_of_first),
    aten.unfold.default: Operator(_unfold, zeros_of_first),
    aten.pixel_shuffle.default: Operator(_pixel_shuffle, zeros_of_first),
    aten.pixel_unshuffle.default: Operator(_pixel_unshuffle, zeros_of_first),
    **table(Operator(_channel_shuffle, zeros_of_first), "channel_shuffle.default", "native_channel_shuffle.default"),
    **table(Operator(_as_complex, zeros_of_first), "view_as_complex.default"),
    **table(Operator(_as_real, zeros_of_first), "view_as_real.default", "view_as_real_copy.default"),
    aten.im2col.default: Operator(_im2col, zeros_of_first),
    aten.col2im.default: Operator(_col2im, zeros_of_first),
    operator.getitem: ITEM,
    **table(NUMBER, "sym_size.int", "sym_numel.default", "sym_stride.int"),
}

_MOVING = table(
    PASS,
    *(
        "view.default",
        "_unsafe_view.default",
        "reshape.default",
        "flatten.using_ints",
        "ravel.default",
        "unflatten.int",
    ),
    *("reshape_as.default", "view_as.default", "permute.default", "transpose.int", "t.default", "mT.default"),
    *("movedim.intlist", "movedim.int", "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims"),
    *("expand.default", "expand_as.default", "broadcast_to.default", "repeat.default", "select.int", "slice.Tensor"),
    *("narrow.default", "repeat_interleave.self_int"),
)
"""Operators whose result holds entries of their first argument."""


_POSITIONS = {
    **dict.fromkeys(_MOVING, same_positions),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int), positions_of_each
    ),
    **dict.fromkeys((aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int), no_positions),
    operator.getitem: positions_of_item,
}

OPERATORS: dict[Any, Operator] = {
    target: replace(entry, positions=_POSITIONS.get(target)) for target, entry in _ENTRIES.items()
}

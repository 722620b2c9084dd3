"""Operators that move entries without computing: reshapes, transposes, concatenation, slicing, expansion."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

from torch import fx

from graphopt.axes.algebra import ONE, Axis, is_frozen, product
from graphopt.axes.infer import NO_ATOMS, Atoms, Operator, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import Window, drop, join, pad, permute, reshape, sections, spread, tile, window
from graphopt.dialects.common import (
    bounds,
    check_cuts,
    dims_of,
    fixed_space,
    freeze_operands,
    frozen,
    hints,
    moved_bounds,
    new_shape,
    no_positions,
    opaque,
    part_sizes,
    parts_of,
    positions_of_each,
    repeated,
    same_positions,
    zeros_of_first,
)
from graphopt.dialects.onnx.common import BY_DATA, constant, is_given, table
from graphopt.graph import Call


def _by_data(t: Typer, call: Call) -> Value:
    freeze_operands(t, call, BY_DATA)
    return opaque(t, call, BY_DATA)


# -- views ----------------------------------------------------------------------------------------------------------


def _reshape(t: Typer, call: Call) -> Value:
    if not is_given(call["shape"]):
        return _by_data(t, call)
    return reshape(t, t[call["data"]], t.shape())


def _resize_reshape(r: Resizer, call: Call) -> None:
    """Rewrite the shape; a 0, which copies a dimension of the input, stays while that one has as many positions."""
    if not is_given(call["shape"]):
        return
    x, axes = r.axes(call["data"]), r.axes(call.node)
    old = list(call["shape"])
    made = new_shape(r, call, [None if n == 0 and not isinstance(n, fx.Node) else n for n in old], axes)
    for i, (n, axis) in enumerate(zip(old, axes, strict=True)):
        if not isinstance(n, fx.Node) and n == 0 and (call["allowzero"] or r.size(axis) == r.size(x[i])):
            made[i] = 0
        elif made[i] is None:
            made[i] = r.size(axis)
    call["shape"] = made


def _flatten(t: Typer, call: Call) -> Value:
    return reshape(t, t[call["input"]], t.shape())


def _transpose(t: Typer, call: Call) -> Value:
    x = t[call["data"]]
    order = call["perm"]
    return x[::-1] if order is None else permute(x, [d % len(x) for d in order])


def _squeeze(t: Typer, call: Call) -> Value:
    x, spec = t[call["data"]], call.spec("data")
    if not is_given(call["axes"]):
        return _by_data(t, call)
    given = call["axes"] is not None
    dims = dims_of(hints(call["axes"]), len(x)) if given else list(range(len(x)))
    if given and not dims:
        return x
    return drop(x, [d for d in dims if spec.shape[d] == 1 and (given or not spec.dynamic[d])], keepdim=False)


def _unsqueeze(t: Typer, call: Call) -> Value:
    if not is_given(call["axes"]):
        return _by_data(t, call)
    x = list(t[call["data"]])
    rank = len(x) + len(call["axes"])
    for d in sorted(n % rank for n in hints(call["axes"])):
        x.insert(d, ONE)
    return tuple(x)


# -- expansion ------------------------------------------------------------------------------------------------------


def _expand(t: Typer, call: Call) -> Value:
    if not is_given(call["shape"]):
        return _by_data(t, call)
    return spread(t, t[call["input"]], t.shape(), call.out.dynamic)


def _resize_expand(r: Resizer, call: Call) -> None:
    """Rewrite the shape, which may have fewer entries than the result, and a 1 where the input is not expanded."""
    if is_given(call["shape"]):
        shape, axes = call["shape"], r.axes(call.node)
        last = axes[len(axes) - len(shape) :]
        call["shape"] = [n if _is_one(n) else r.entry(call, n, a) for n, a in zip(shape, last, strict=True)]


def _is_one(number: Any) -> bool:
    return isinstance(number, int) and number == 1


def _zeros_of_spread(z: Zeros, call: Call) -> Atoms:
    """Zero where the source is; what it was spread along may hold its indices, too."""
    return z.some(call.node, call["input"])


def _tile(t: Typer, call: Call) -> Value:
    if not is_given(call["repeats"]):
        return _by_data(t, call)
    out, counts = tile(t, t[call["input"]], hints(call["repeats"]))
    return repeated(t, call, out, counts, len(counts))


def _resize_tile(r: Resizer, call: Call) -> None:
    if is_given(call["repeats"]):
        call["repeats"] = r.entries(call, call["repeats"], r.fact)


# -- joining and cutting --------------------------------------------------------------------------------------------


def _concat(t: Typer, call: Call) -> Value:
    return join(t, [t[n] for n in call["inputs"]], call["axis"])


def _zeros_of_concat(z: Zeros, call: Call) -> Atoms:
    return z.joined(call["inputs"])


def _split(t: Typer, call: Call) -> Value:
    if not is_given(call["split"]):
        return _by_data(t, call)
    x = t[call["input"]]
    dim = call["axis"] % len(x)
    sizes = part_sizes(call, dim)
    if is_frozen(x[dim]):
        return [(*x[:dim], t.fixed(n, "part of a frozen axis"), *x[dim + 1 :]) for n in sizes]
    check_cuts(t, call.spec("input"), x[dim], dim, accumulate(sizes))
    return list(sections(t, x, dim, sizes))


def _resize_split(r: Resizer, call: Call) -> None:
    """Spell the part sizes out: after a pruning the parts need not be equal."""
    dim = call["axis"] % len(r.axes(call["input"]))
    axes = parts_of(r, call, dim)
    if not any(map(r.changed, axes)):
        return
    if call["split"] is not None:
        call["split"] = r.entries(call, call["split"], axes)
    elif not any(part.dynamic[dim] for part in call.node.meta["spec"]):
        # Equal parts of a dynamic axis shrink alike, however long they are; others have their lengths.
        kwargs = {name: value for name, value in call.node.kwargs.items() if name not in ("num_outputs", "split")}
        call.node.args = (call["input"], [r.size(a) for a in axes])
        call.node.kwargs = {"outputs": len(axes), **kwargs}


def _slice(t: Typer, call: Call) -> Value:
    """Cut several dimensions at once, each to a window of its positions."""
    if not all(is_given(call[name]) for name in ("starts", "ends", "axes", "steps")):
        return _by_data(t, call)
    out = list(t[call["data"]])
    parts: dict[int, Window] = {}
    for i, (dim, start, end, step) in enumerate(_cuts(call)):
        axis = out[dim]
        if step < 0:
            t.freeze(axis, "reversed along it")
            out[dim] = t.fixed(t.shape()[dim], "reversed along it")
            continue
        first, stop = bounds(start, end, axis.size)
        if (first, stop, step) != (0, axis.size, 1):
            check_cuts(t, call.spec("data"), axis, dim, (first, stop))
            parts[i] = window(t, axis, first, stop, step)
            out[dim] = parts[i].taken
    t.facts[call.node] = parts
    return tuple(out)


def _cuts(call: Call) -> list[tuple[int, Any, Any, int]]:
    """Return dimension, bounds and step of each cut."""
    rank, count = len(call.spec("data").shape), len(call["starts"])
    dims = dims_of(hints(call["axes"]) if call["axes"] is not None else list(range(count)), rank) if count else []
    steps = hints(call["steps"]) if call["steps"] is not None else [1] * count
    return list(zip(dims, call["starts"], call["ends"], steps, strict=True))


def _resize_slice(r: Resizer, call: Call) -> None:
    if not r.fact:
        return
    starts, ends = list(call["starts"]), list(call["ends"])
    for i, (_, start, end, step) in enumerate(_cuts(call)):
        if i in r.fact:
            starts[i], ends[i] = moved_bounds(r, call, r.fact[i], start, end, step)
    call["starts"], call["ends"] = starts, ends


def _pad(t: Typer, call: Call) -> Value:
    if not is_given(call["pads"]) or not is_given(call["axes"]):
        return _by_data(t, call)
    x = t[call["data"]]
    dims = dims_of(None if call["axes"] is None else hints(call["axes"]), len(x))
    amounts = hints(call["pads"])
    around = dict(zip(dims, zip(amounts[: len(dims)], amounts[len(dims) :], strict=True), strict=True))
    widths = [n for d in reversed(range(len(x))) for n in around.get(d, (0, 0))]
    return pad(t, x, widths, t.shape(), constant=call["mode"] == "constant")


def _zeros_of_pad(z: Zeros, call: Call) -> Atoms:
    value = call["constant_value"]
    if isinstance(value, fx.Node):
        found = constant(value)
        value = 1 if found is None else found.reshape(-1)[0].item()
    return z[call["data"]] if not value else NO_ATOMS


def _center(t: Typer, call: Call) -> Value:
    """Freeze the dimensions that are cropped or padded; the others pass."""
    if not is_given(call["shape"]):
        return _by_data(t, call)
    x, shape = t[call["input_data"]], t.shape()
    for axis, size in zip(x, shape, strict=True):
        if axis.size != size:
            t.freeze(axis, "cropped or padded evenly")
    return tuple(a if a.size == n else t.fixed(n, "a padded dimension") for a, n in zip(x, shape, strict=True))


def _resize_center(r: Resizer, call: Call) -> None:
    axes = r.axes(call.node)
    if is_given(call["shape"]):
        dims = dims_of(call["axes"], len(axes))
        call["shape"] = r.entries(call, call["shape"], [axes[d] for d in dims])


def _triangle(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    for axis in x[-2:]:
        t.freeze(axis, "a triangle of it is taken")
    return x


def _reverse(t: Typer, call: Call) -> Value:
    x = t[call["input"]]
    for name in ("time_axis", "batch_axis"):
        t.freeze(x[call[name] % len(x)], "reversed along it")
    return x


# -- channels into space and back -----------------------------------------------------------------------------------


def _depth_to_space(t: Typer, call: Call) -> Value:
    """``(n, c b b, h, w) -> (n, c, h b, w b)``: the b x b sub-positions are fixed, outside (DCR) or inside."""
    x = fixed_space(t, t[call["input"]], 2)
    places = call["blocksize"] ** 2
    channels = x[1].size // places
    if call["mode"] == "DCR":
        inner, depth = t.split(x[1], places)
    else:
        depth, inner = t.split(x[1], channels)
    t.freeze(inner, "a sub-position in space")
    return (x[0], depth, *t.opaque(t.shape()[2:], "a spatial dimension"))


def _space_to_depth(t: Typer, call: Call) -> Value:
    x = fixed_space(t, t[call["input"]], 2)
    places: Axis = t.fixed(call["blocksize"] ** 2, "a sub-position in space")
    factors = (places, x[1]) if call["mode"] == "DCR" else (x[1], places)
    return (x[0], product(factors), *t.opaque(t.shape()[2:], "a spatial dimension"))


def _col2im(t: Typer, call: Call) -> Value:
    """``(n, c k, l) -> (n, c, …)`` with ``k`` positions in a patch."""
    if not is_given(call["block_shape"]):
        return _by_data(t, call)
    x = fixed_space(t, t[call["input"]], 1)
    channels, patch = t.split(x[1], x[1].size // prod(hints(call["block_shape"])))
    t.freeze(patch, "a patch's position")
    return (x[0], channels, *t.opaque(t.shape()[2:], "a spatial dimension"))


ENTRIES: dict[str, Operator] = {
    "Reshape": Operator(_reshape, zeros_of_first, _resize_reshape, same_positions),
    "Flatten": Operator(_flatten, zeros_of_first, positions=same_positions),
    "Transpose": Operator(_transpose, zeros_of_first, positions=same_positions),
    "Squeeze": Operator(_squeeze, zeros_of_first, positions=same_positions),
    "Unsqueeze": Operator(_unsqueeze, zeros_of_first, positions=same_positions),
    "Expand": Operator(_expand, _zeros_of_spread, _resize_expand, same_positions),
    "Tile": Operator(_tile, _zeros_of_spread, _resize_tile, same_positions),
    "Concat": Operator(_concat, _zeros_of_concat),
    "Split": Operator(_split, zeros_of_first, _resize_split, positions_of_each),
    "Slice": Operator(_slice, zeros_of_first, _resize_slice, same_positions),
    "Pad": Operator(_pad, _zeros_of_pad),
    "CenterCropPad": Operator(_center, zeros_of_first, _resize_center),
    "Trilu": Operator(_triangle, zeros_of_first),
    "ReverseSequence": Operator(_reverse, zeros_of_first),
    "DepthToSpace": Operator(_depth_to_space, zeros_of_first),
    "SpaceToDepth": Operator(_space_to_depth, zeros_of_first),
    "Col2Im": Operator(_col2im, zeros_of_first),
    # The sizes of a tensor as a tensor: the reader leaves it where data decide what becomes of them.
    **table(replace(frozen("its size is data"), positions=no_positions), "Shape", "Size"),
}

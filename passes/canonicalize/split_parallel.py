"""Split packed linear maps, such as q, k and v in one, into one map a part, so that each part has widths of its own."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import fx

from graphopt.axes.algebra import Indices
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import Op
from graphopt.dialects.products import operator_key
from graphopt.editing import add_tensor, copied, insert, read, remove_dead, replace
from graphopt.graph import SPEC, Call, Graph, Sources, TensorSpec, spec_of, tensor_spec
from graphopt.passes.affine import Affine, made_of, read_affine, repeat_layer, unavailable
from graphopt.passes.onnx_calls import is_call, order_of
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import listing

aten = torch.ops.aten

RESHAPES: Final[dict[Any, str]] = {
    aten.reshape.default: "shape",
    aten.view.default: "size",
    aten._unsafe_view.default: "size",
    "Reshape": "shape",
}
ORDERS: Final = frozenset(
    {aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, "Transpose"}
)
COPIES: Final = frozenset({aten.contiguous.default, aten.clone.default, aten.alias.default, "Identity"})
SECTIONS: Final = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int, "Split"}
)
WINDOWS: Final = frozenset({aten.slice.Tensor, aten.narrow.default, aten.select.int, "Slice", "Gather"})


class Refusal(Exception):  # noqa: N818  # no error: it ends the reading of a site, and its text is the reason
    """Say why a packed map stays whole."""


@dataclass(frozen=True)
class Digit:
    """One digit of the features' numbers in mixed radix: feature ``f`` has here the digit ``f // stride % size``."""

    size: int
    stride: int


Layout = tuple[tuple[Digit | int, ...], ...]
"""For every dimension of a view, what it counts, slowest first: digits of the features, or so many other indices."""


@dataclass(frozen=True)
class Part:
    """One part of a packed map's result: the node that yields it, and the digits ``start <= digit < stop`` it takes."""

    node: fx.Node
    start: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """A packed map: the views of its result in order, and the parts into which the last of them is cut.

    ``cut`` is the digit by which it is cut, which the dimension ``places[i]`` of ``layouts[i]`` counts, alone or with
    others; ``drops`` says that a part has no dimension for it any more. The first layout is that of the result itself.
    """

    affine: Affine
    views: tuple[fx.Node, ...]
    layouts: tuple[Layout, ...]
    places: tuple[int, ...]
    cut: Digit
    drops: bool
    parts: tuple[Part, ...]

    def features(self, part: Part) -> Indices:
        """Return the features that a part takes, in order."""
        digits = np.arange(self.affine.shape[0], dtype=np.int64) // self.cut.stride % self.cut.size
        found: Indices = np.flatnonzero((digits >= part.start) & (digits < part.stop))
        return found

    def dropped(self, position: int) -> int | None:
        """Return the dimension of a view that its parts do not have."""
        place = self.places[position]
        return place if self.drops and self.layouts[position][place] == (self.cut,) else None

    def spec(self, position: int, part: Part) -> TensorSpec:
        """Return the type of a part of a view."""
        whole = tensor_spec(self.views[position - 1] if position else self.affine.node)
        shape, dynamic = list(whole.shape), list(whole.dynamic)
        place = self.places[position]
        shape[place] = shape[place] // self.cut.size * (part.stop - part.start)
        if self.dropped(position) is not None:
            del shape[place], dynamic[place]
        return replace_fields(whole, shape=tuple(shape), dynamic=tuple(dynamic))


@register
@dataclass(frozen=True)
class SplitParallel(Pass):
    """Split every linear layer or convolution whose result is only taken apart into one operator a part.

    The features ``f`` of a packed result ``y = W x + b`` are numbered in mixed radix: a reshape to ``(…, 3, heads, d)``
    gives them the digits ``part``, ``head`` and ``place``. Where views and permutations lead to a cut along one digit
    (``chunk``, ``split``, ``unbind``, ``select``, slices), the part that takes the digits D reads the rows
    ``R = {f : digit(f) in D}`` alone, so that ``y[R] = W[R] x + b[R]``, seen through the same views without what was
    cut off, is that part. Exact: every number is computed as before.

    Nothing becomes cheaper by it. But in a view like ``(…, 3, heads, d)`` the parts share their widths, and the width
    of v can only go with those of q and k; afterwards each is free. ``merge-parallel`` is the way back.

    A part's tensors are named after the packed ones: ``qkv.weight`` gives ``qkv.weight_0`` and so on, parameters as
    before. Rows that no part takes are dropped. A packed result that is also read whole is left alone, and so are
    tensors that are shared, or computed; of a computed bias, a concatenation at the same places will do.
    """

    name: ClassVar[str] = "split-parallel"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in list(graph.nodes):
            affine = read_affine(node)
            if affine is None or not _is_cut(node) or not context.allows(node.name):
                continue
            try:
                packed = _read(graph, affine)
                if len(packed.parts) < 2:
                    raise Refusal(f"only one part of it is taken ({packed.parts[0].node.name})")
                biases = _biases(graph, packed)
            except Refusal as reason:
                context.skipped(node.name, str(reason))
                continue
            _split(graph, packed, biases)
            sizes = [len(packed.features(part)) for part in packed.parts]
            context.applied(
                node.name, f"split {affine.shape[0]} features into {listing(list(map(str, sizes)), 8)}", parts=sizes
            )
        remove_dead(graph)
        return PassResult(graph)


# -- reading ----------------------------------------------------------------------------------------------------------


def _is_cut(node: fx.Node) -> bool:
    """Say whether views lead from a node to a cut of its features; what else reads it is looked at later."""
    return any(_cuts(user, node) or (_is_view(user) and _is_cut(user)) for user in node.users)


def _cuts(node: fx.Node, value: fx.Node) -> bool:
    """Say whether a call takes parts of ``value``; a Gather by data, or from a table, takes none."""
    if operator_key(node) == "Gather":
        indices = Call(node)["indices"]
        known = isinstance(indices, fx.Node) and indices.op == "get_attr" and prod(tensor_spec(indices).shape) == 1
        return known and Call(node)["data"] is value
    return operator_key(node) in SECTIONS or operator_key(node) in WINDOWS


def _is_view(node: fx.Node) -> bool:
    key = operator_key(node)
    return (key in RESHAPES and isinstance(Call(node)[RESHAPES[key]], list | tuple)) or key in ORDERS or key in COPIES


def _read(graph: Graph, affine: Affine) -> Packed:
    """Follow the views of a map's result to where it is cut."""
    if affine.groups != 1:
        raise Refusal(f"its {affine.groups} groups tie rows to parts of the input")
    rank = len(affine.out.shape)
    feature = rank + affine.channel
    layout: Layout = tuple(
        (Digit(size, 1),) if dim == feature else (size,) for dim, size in enumerate(affine.out.shape)
    )
    views, layouts = [], [layout]
    node = affine.node
    while any(_is_view(user) for user in node.users):
        if len(node.users) > 1:
            raise Refusal(f"{node.name} has several readers: {listing([user.name for user in node.users])}")
        (node,) = node.users
        layout = _seen_through(node, layout)
        views.append(node)
        layouts.append(layout)
    cut, drops, parts = _cut(graph, node, layout)
    places = [_place(view, each, cut) for view, each in zip([affine.node, *views], layouts, strict=True)]
    if drops and layouts[0][feature] == (cut,):
        raise Refusal(f"{node.name} takes its features one by one")
    packed = Packed(affine, tuple(views), tuple(layouts), tuple(places), cut, drops, tuple(parts))
    for position, view in enumerate(views, 1):
        _check_copied(packed, position, view)
    return packed


def _check_copied(packed: Packed, position: int, view: fx.Node) -> None:
    """Refuse a Reshape that copies, by a 0, a size that will stand at another place once a dimension is gone."""
    if operator_key(view) != "Reshape":
        return
    gone = [each for each in (packed.dropped(position - 1), packed.dropped(position)) if each is not None]
    for place, entry in enumerate(_entries(view)):
        if gone and isinstance(entry, int) and entry == 0 and place >= min(gone):
            raise Refusal(f"{view.name} copies the size of dimension {place}, which will be another one")


def _entries(view: fx.Node) -> list[Any]:
    """Return the sizes that a reshape is given; with those that an ONNX file copies, where they are fixed."""
    entries = list(Call(view)[RESHAPES[operator_key(view)]])
    if operator_key(view) != "Reshape" or Call(view)["allowzero"]:
        return entries
    spec = tensor_spec(view.args[0])
    return [
        spec.shape[place] if isinstance(entry, int) and entry == 0 and not spec.dynamic[place] else entry
        for place, entry in enumerate(entries)
    ]


def _place(view: fx.Node, layout: Layout, cut: Digit) -> int:
    """Return the dimension that counts the digit ``cut``, alone or as a part of another."""
    for place, row in enumerate(layout):
        for each in row:
            if (
                isinstance(each, Digit)
                and each.stride <= cut.stride
                and cut.stride * cut.size <= each.stride * each.size
            ):
                entries = _entries(view) if operator_key(view) in RESHAPES else ()
                if entries and not isinstance(entries[place], int):
                    raise Refusal(f"{view.name} computes the size of dimension {place} ({entries[place]})")
                return place
    raise Refusal(f"{view.name} spreads the parts over several dimensions")


def _seen_through(view: fx.Node, layout: Layout) -> Layout:
    if operator_key(view) in RESHAPES:
        return _reshaped(view, layout)
    if operator_key(view) in ORDERS:
        return tuple(layout[dim] for dim in _order(view, len(layout)))
    return layout


def _order(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions of the argument in the order in which the result has them."""
    call = Call(node)
    if is_call(node, "Transpose"):
        return list(order_of(node) or ())
    if node.target is aten.permute.default:
        return [dim % rank for dim in call["dims"]]
    names = ("dim0", "dim1") if call.has("dim0") else ("axis0", "axis1")
    first, second = (call[name] % rank for name in names)
    order = list(range(rank))
    order[first], order[second] = second, first
    return order


def _reshaped(view: fx.Node, layout: Layout) -> Layout:
    """Deal what the dimensions count, slowest first, to the dimensions of the new shape."""
    waiting = [each for dim in reversed(layout) for each in reversed(dim) if _size(each) != 1]
    found: list[tuple[Digit | int, ...]] = []
    for wanted in tensor_spec(view).shape:
        taken: list[Digit | int] = []
        while prod(map(_size, taken)) < wanted:
            each, missing = waiting.pop(), wanted // prod(map(_size, taken))
            if _size(each) > missing:
                if _size(each) % missing:
                    raise Refusal(f"{view.name} regroups its features at places that are no multiples of each other")
                each, rest = _divided(each, missing)
                waiting.append(rest)
            taken.append(each)
        if prod(map(_size, taken)) != wanted:
            raise Refusal(f"{view.name} regroups its features at places that are no multiples of each other")
        found.append(_joined(taken))
    return tuple(found)


def _size(each: Digit | int) -> int:
    return each.size if isinstance(each, Digit) else each


def _divided(each: Digit | int, size: int) -> tuple[Digit | int, Digit | int]:
    if isinstance(each, Digit):
        rest = each.size // size
        return Digit(size, each.stride * rest), Digit(rest, each.stride)
    return size, each // size


def _joined(row: Sequence[Digit | int]) -> tuple[Digit | int, ...]:
    """Join digits that follow each other to one."""
    found: list[Digit | int] = []
    for each in row:
        last = found[-1] if found else None
        if isinstance(last, Digit) and isinstance(each, Digit) and last.stride == each.size * each.stride:
            found[-1] = Digit(last.size * each.size, each.stride)
        else:
            found.append(each)
    return tuple(found)


def _cut(graph: Graph, node: fx.Node, layout: Layout) -> tuple[Digit, bool, list[Part]]:
    """Read how ``node`` is taken apart."""
    cuts = [user for user in node.users if _cuts(user, node)]
    if len(cuts) < len(node.users):
        whole = [user.name for user in node.users if user not in cuts]
        raise Refusal(f"{node.name} is also read whole: by {listing(whole)}")
    dims = {_dim(each) % len(layout) for each in cuts}
    drops = {_drops(each) for each in cuts}
    if len(dims) > 1 or len(drops) > 1:
        raise Refusal(f"{node.name} is cut in several ways: by {listing([each.name for each in cuts])}")
    row = layout[dims.pop()]
    digit = row[0] if len(row) == 1 else None
    if not isinstance(digit, Digit):
        raise Refusal(f"{node.name} is cut along a dimension that is not its features alone")
    parts = [part for each in cuts for part in _parts(graph, each, digit.size)]
    if any(part.start == part.stop for part in parts):
        raise Refusal(f"{node.name} has empty parts")
    parts.sort(key=lambda part: part.start)
    for one, two in pairwise(parts):
        if two.start < one.stop:
            raise Refusal(f"{one.node.name} and {two.node.name} overlap")
    return digit, drops.pop(), parts


def _dim(cut: fx.Node) -> int:
    """Return the dimension along which a call cuts."""
    call = Call(cut)
    if operator_key(cut) != "Slice":
        return int(call["dim"] if call.has("dim") else call["axis"])
    axes = call["axes"]
    if not isinstance(call["starts"], list | tuple) or len(call["starts"]) != 1:
        raise Refusal(f"{cut.name} cuts along several dimensions, or at places that depend on data")
    return int(axes[0]) if axes else 0


def _drops(cut: fx.Node) -> bool:
    """Say whether the parts have lost the dimension along which they were cut."""
    if operator_key(cut) == "Gather":
        return not Call(cut).spec("indices").shape
    return cut.target in (aten.unbind.int, aten.select.int)


def _parts(graph: Graph, cut: fx.Node, size: int) -> Iterator[Part]:
    call = Call(cut)
    if is_call(cut, "Slice"):
        step = 1 if call["steps"] is None else call["steps"][0]
        if step != 1:
            raise Refusal(f"{cut.name} takes every {step}th of its features")
        start, stop = _bound(call["starts"][0], 0, size), _bound(call["ends"][0], size, size)
        yield Part(cut, start, max(start, stop))
    elif is_call(cut, "Gather"):
        start = _bound(int(graph.tensor(str(call["indices"].target))), 0, size)
        yield Part(cut, start, start + 1)
    elif operator_key(cut) in SECTIONS:
        yield from _sections(cut, call)
    elif cut.target is aten.slice.Tensor:
        start, stop = (_bound(call[name], default, size) for name, default in (("start", 0), ("end", size)))
        if call["step"] != 1:
            raise Refusal(f"{cut.name} takes every {call['step']}th of its features")
        yield Part(cut, start, max(start, stop))
    elif cut.target is aten.narrow.default:
        start = _bound(call["start"], 0, size)
        yield Part(cut, start, _bound(start + call["length"], size, size))
    else:
        start = _bound(call["index"], 0, size)
        yield Part(cut, start, start + 1)


def _sections(cut: fx.Node, call: Call) -> Iterator[Part]:
    specs = spec_of(cut)
    assert isinstance(specs, tuple)
    sizes = [
        1 if cut.target is aten.unbind.int else spec.shape[_dim(cut)] for spec in specs if isinstance(spec, TensorSpec)
    ]
    stops = np.cumsum(sizes).tolist()
    for user in cut.users:
        if user.target is not operator.getitem:
            raise Refusal(f"{user.name} takes all parts of {cut.name}")
        index: Any = user.args[1]
        yield Part(user, stops[index] - sizes[index], stops[index])


def _bound(value: Any, default: int, size: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int):
        raise Refusal(f"a bound is computed ({value})")
    return min(max(value + size if value < 0 else value, 0), size)


# -- splitting --------------------------------------------------------------------------------------------------------


def _biases(graph: Graph, packed: Packed) -> list[fx.Node | None]:
    """Return what of the bias exists already for each part; raises where weight or bias cannot be taken apart."""
    affine = packed.affine
    reason = unavailable(graph, [affine.weight])
    if reason is None and affine.bias is not None:
        reason = unavailable(graph, [affine.bias])
        if reason is not None and affine.bias.target is aten.cat.default:
            return _operands(packed, affine.bias)
    if reason is not None:
        raise Refusal(reason)
    return [None] * len(packed.parts)


def _operands(packed: Packed, bias: fx.Node) -> list[fx.Node | None]:
    """Return the operands of a concatenated bias, one a part."""
    tensors = Call(bias)["tensors"]
    stops = np.cumsum([tensor_spec(each).shape[0] for each in tensors]).tolist()
    places = {(stop - tensor_spec(each).shape[0], stop): each for each, stop in zip(tensors, stops, strict=True)}
    found = []
    for part in packed.parts:
        rows = packed.features(part)
        each = places.get((int(rows[0]), int(rows[-1]) + 1))
        if each is None or len(rows) != tensor_spec(each).shape[0]:
            raise Refusal(f"{bias.name} joins biases at other places")
        found.append(each)
    return found


def _split(graph: Graph, packed: Packed, biases: Sequence[fx.Node | None]) -> None:
    affine = packed.affine
    for number, (part, bias) in enumerate(zip(packed.parts, biases, strict=True)):
        rows = packed.features(part)
        first = affine.product
        weight = _rows(graph, affine.weight, rows, number, first, affine.rows)
        if affine.bias is not None and bias is None:
            bias = _rows(graph, affine.bias, rows, number, first, affine.bias_dim)
        new = repeat_layer(graph, affine, first, weight, bias, packed.spec(0, part))
        for position, view in enumerate(packed.views, 1):
            new = _repeated(graph, packed, position, view, part, new)
        replace(part.node, new)


def _repeated(graph: Graph, packed: Packed, position: int, view: fx.Node, part: Part, argument: fx.Node) -> fx.Node:
    """Repeat a view of the packed result on one part; a view that has nothing left to do is left out."""
    dropped = packed.dropped(position - 1)
    spec = packed.spec(position, part)
    key = operator_key(view)
    if key in ORDERS and dropped is not None:
        order = [dim - (dim > dropped) for dim in _order(view, len(packed.layouts[position])) if dim != dropped]
        if order == sorted(order):
            return argument
        if isinstance(view.target, Op):
            return insert(graph, view, view.target, (argument,), {"perm": order}, like=view, spec=spec)
        return insert(graph, view, aten.permute.default, (argument, order), like=view, spec=spec)
    if key in RESHAPES and spec == spec_of(argument):
        return argument
    new = copied(graph, view, view)
    new.update_arg(0, argument)
    new.meta[SPEC] = spec
    if key in RESHAPES:
        entries = _entries(view)
        place = packed.places[position]
        if packed.dropped(position) is not None:
            del entries[place]
        elif entries[place] != -1:
            entries[place] = spec.shape[place]
        Call(new)[RESHAPES[key]] = entries
    return new


def _rows(graph: Graph, tensor: fx.Node, rows: Indices, number: int, before: fx.Node, dim: int) -> fx.Node:
    """Make a tensor of some rows of another, along ``dim``, and return a node that reads it.

    One number for all rows is one for some of them.
    """
    name = str(tensor.target)
    whole = graph.tensor(name)
    if whole.numel() == 1 and isinstance(tensor.meta[SPEC], TensorSpec) and is_onnx(graph):
        return tensor
    value = made_of([whole], whole.detach().index_select(dim, torch.from_numpy(rows).to(whole.device)))
    sources: Sources = {each: graph.stands_for(name, each) for each in range(whole.dim())}
    sources[dim] = tuple(source.at(rows) for source in sources[dim])
    return read(graph, add_tensor(graph, f"{name}_{number}", value, sources=sources), before)

"""Take a tensor apart in one call, and look up single entries."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read, remove_dead, replace
from graphopt.graph import Call, Graph, TensorSpec, spec_of
from graphopt.passes.onnx_calls import is_call, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register


@register
@dataclass(frozen=True)
class SimplifySlices(Pass):
    """Make one Split of slices that take a tensor apart, and one Gather of a slice of one entry and its Squeeze.

    ``x[0:a], x[a:b], …, x[z:n]`` along one axis are the parts of ``Split(x, [a, b - a, …])``, in whatever order they
    are computed. ``Squeeze(x[i:i+1])`` is the lookup ``Gather(x, i)``, which copies once; so are all parts of a Split
    into single entries that are squeezed, which copies what was there already. Outputs are the same numbers.

    Left as they are: slices that overlap, leave entries out, or are cut by sizes that vary.
    """

    name: ClassVar[str] = "simplify-slices"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    needs_values: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        for node in list(graph.nodes):
            if is_call(node, "Squeeze", "Reshape"):
                _look_up(graph, node, context)
        remove_dead(graph)
        for node in list(graph.nodes):
            if len(node.users) > 1:
                _split(graph, node, context)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


@dataclass(frozen=True)
class _Piece:
    """A slice along one axis, forwards, of one tensor."""

    node: fx.Node
    axis: int
    start: int
    end: int


def _piece(node: fx.Node) -> _Piece | None:
    """Read a slice of one axis by numbers; None for anything else."""
    if not is_call(node, "Slice"):
        return None
    call, spec = Call(node), tensor_type(node.args[0])
    starts, ends, axes, steps = (call[name] for name in ("starts", "ends", "axes", "steps"))
    if spec is None or not isinstance(starts, list | tuple) or len(starts) != 1 or not isinstance(ends, list | tuple):
        return None
    axis = (0 if axes is None else axes[0]) % len(spec.shape)
    if spec.dynamic[axis] or (steps is not None and list(steps) != [1]):
        return None
    if not isinstance(starts[0], int) or not isinstance(ends[0], int):
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(spec.shape[axis])
    return _Piece(node, axis, start, end)


# -- parts --


def _split(graph: Graph, x: fx.Node, context: Context) -> None:
    """Make one Split of the slices of ``x`` along an axis."""
    spec = tensor_type(x)
    if spec is None:
        return
    found: dict[int, list[_Piece]] = {}
    for user in x.users:
        piece = _piece(user)
        if piece is not None and user.args[0] is x:
            found.setdefault(piece.axis, []).append(piece)
    for axis, pieces in found.items():
        pieces.sort(key=lambda piece: (piece.start, piece.end))
        first = min(piece.node for piece in pieces)
        if len(pieces) < 2 or not context.allows(first.name):
            continue
        ends = [0, *(piece.end for piece in pieces)]
        if [piece.start for piece in pieces] != ends[:-1] or ends[-1] != spec.shape[axis] or len(set(ends)) < len(ends):
            words = ", ".join(f"{piece.start}:{piece.end}" for piece in pieces)
            context.skipped(first.name, f"{words} of {spec.shape[axis]} do not take {x.name} apart")
            continue
        _take_apart(graph, x, first, pieces)
        context.applied(first.name, f"takes {x.name} apart with {len(pieces) - 1} more", axis=axis)


def _take_apart(graph: Graph, x: fx.Node, before: fx.Node, pieces: list[_Piece]) -> None:
    lengths = [piece.end - piece.start for piece in pieces]
    specs = tuple(spec_of(piece.node) for piece in pieces)
    parts = insert(graph, before, op("Split"), (x, lengths), {"axis": pieces[0].axis}, like=pieces[0].node, spec=specs)
    made = [insert(graph, before, operator.getitem, (parts, i), like=p.node) for i, p in enumerate(pieces)]
    for piece, new in zip(pieces, made, strict=True):
        replace(piece.node, new)


# -- single entries --


def _look_up(graph: Graph, node: fx.Node, context: Context) -> None:
    """Make a Gather of a slice of one entry whose dimension is dropped."""
    value = node.args[0]
    found = _entry(value)
    if found is None or not isinstance(value, fx.Node):
        return
    x, axis, index = found
    if not _drops(node, value, axis) or not context.allows(node.name):
        return
    name = _index(graph, index)
    new = insert(graph, node, op("Gather"), (x, read(graph, name, node)), {"axis": axis}, like=node)
    replace(node, new)
    context.applied(node.name, f"looks up entry {index} of {x.name}", axis=axis)


def _entry(value: Any) -> tuple[fx.Node, int, int] | None:
    """Return of what, along which axis, a value is which single entry; None where it is more, or others read it."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return None
    piece = _piece(value)
    if piece is not None:
        return (value.args[0], piece.axis, piece.start) if piece.end - piece.start == 1 else None  # type: ignore[return-value]
    if value.target is not operator.getitem or not is_call(value.args[0], "Split"):
        return None
    parts, index = value.args
    specs, x = spec_of(parts), parts.args[0]  # type: ignore[union-attr, arg-type]
    spec = tensor_type(x)
    if spec is None or not isinstance(specs, tuple) or not isinstance(index, int):
        return None
    axis = Call(parts)["axis"] % len(spec.shape)  # type: ignore[arg-type]
    single = all(isinstance(each, TensorSpec) and each.shape[axis] == 1 for each in specs)
    dropped = all(len(part.users) == 1 and is_call(next(iter(part.users)), "Squeeze", "Gather") for part in parts.users)  # type: ignore[union-attr]
    return (x, axis, index) if single and dropped and not spec.dynamic[axis] else None  # type: ignore[return-value]


def _drops(node: fx.Node, value: fx.Node, axis: int) -> bool:
    """Say whether a call drops one dimension and changes nothing else."""
    before, after = tensor_type(value), tensor_type(node)
    if before is None or after is None:
        return False
    if is_call(node, "Squeeze"):
        axes = Call(node)["axes"]
        return isinstance(axes, list | tuple) and [each % len(before.shape) for each in axes] == [axis]
    shape = before.shape[:axis] + before.shape[axis + 1 :]
    dynamic = before.dynamic[:axis] + before.dynamic[axis + 1 :]
    return (after.shape, after.dynamic) == (shape, dynamic) and sum(dynamic) <= 1 and 0 not in shape


def _index(graph: Graph, index: int) -> str:
    """Return the name of the tensor that holds a position; all lookups share it."""
    name = f"index_{index}"
    found = graph.module._buffers.get(name)
    if (
        found is not None
        and found.dtype is torch.int64
        and found.dim() == 0
        and not found.is_meta
        and int(found) == index
    ):
        return name
    return add_tensor(graph, name, torch.tensor(index))

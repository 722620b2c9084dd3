"""Apply kept indices to a graph: slice its tensors and rewrite the arguments that hold sizes.

What may live here: the rewriting walk. How one operator's arguments follow is said in its dialect entry; what is kept
is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.axes.algebra import Atom, Axis, Indices, kept_positions, leaves, size_of
from graphopt.axes.infer import Axes, Resizer, Typing, Value
from graphopt.errors import PassError
from graphopt.graph import SPEC, Call, Graph, Spec, TensorSpec, without_collection
from graphopt.plan import Plan


@without_collection()
def rewrite(typing: Typing, keep: Mapping[Atom, Indices]) -> Graph:
    """Return a copy of the typed graph that has only the kept indices; the typed graph is not changed.

    ``keep`` maps atoms of free groups to sorted kept indices; atoms that are not named stay whole. Tensors that lose
    nothing are shared with the original, those that do are new.

    Raises:
        PassError: ``keep`` names a frozen atom, or indices that are not sorted, unique and in range.
    """
    keep = _checked(typing, keep)
    changes = _Changes(keep)
    graph = typing.graph.clone()
    old_of = dict(zip(graph.nodes, typing.graph.nodes, strict=True))
    for name, axes in typing.tensors.items():
        if changes.any(axes):
            graph.set_tensor(name, slice_tensor(graph.tensor(name), axes, keep, changes))
    if graph.weights is not None:
        graph.weights = graph.weights.sliced(
            {
                name: {dim: changes.positions(axis) for dim, axis in enumerate(axes) if changes.axis(axis)}
                for name, axes in typing.tensors.items()
                if name in graph.weights and changes.any(axes)
            }
        )
    if any(changes.any(axes) for axes in typing.tensors.values()):
        sizes = {a: len(k) for a, k in keep.items()}
        for node, old in old_of.items():
            touched = changes.value(typing.values[old])
            if node.op == "call_function" and (
                touched or any(changes.value(typing.values[n]) for n in old.all_input_nodes)
            ):
                operator = typing.operators.get(node.target)
                if operator is not None and operator.resize is not None:
                    resizer = Resizer(keep, partial(_axes_of, typing, old_of), typing.facts.get(old))
                    operator.resize(resizer, Call(node))
            if touched:
                node.meta[SPEC] = _resized(node.meta[SPEC], typing.values[old], sizes)
        if graph.sources:
            _close_up(graph, typing, keep)
        graph.module.recompile()
    return graph


def slice_tensor(tensor: torch.Tensor, axes: Axes, keep: Mapping[Atom, Indices], changes: Any = None) -> torch.Tensor:
    """Return the kept part of ``tensor``, contiguous, a parameter if it was one."""
    changes = changes or _Changes(keep)
    found = tensor.detach()
    dims = [dim for dim, axis in enumerate(axes) if changes.axis(axis)]
    for turn, dim in enumerate(dims):
        positions = torch.from_numpy(changes.positions(axes[dim])).to(tensor.device)
        last = turn == len(dims) - 1
        out = None if last else changes.scratch(turn, found, dim, len(positions))
        found = torch.index_select(found, dim, positions, out=out)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


def _close_up(graph: Graph, typing: Typing, keep: Mapping[Atom, Indices]) -> None:
    """Let what the made tensors stand for follow: fewer positions, of smaller tensors of the input model."""
    plan = Plan.of(typing, keep)
    graph.sources = {
        name: {
            dim: tuple(plan.after(source.at(kept_positions(typing.tensors[name][dim], keep))) for source in sources)
            for dim, sources in dims.items()
        }
        for name, dims in graph.sources.items()
        if name in typing.tensors
    }


class _Changes:
    """Answer, with a memory, which axes lose indices and which positions they keep."""

    def __init__(self, keep: Mapping[Atom, Indices]) -> None:
        self._keep = keep
        self._changed: dict[int, bool] = {}
        self._positions: dict[int, Indices] = {}
        self._scratch: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def scratch(self, turn: int, tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor | None:
        """Lend memory for ``tensor`` with another size of ``dim``, between two slicings of it.

        Fresh memory of a large tensor costs more than the slicing: the system hands it out page by page. So one piece
        serves all tensors of a type; ``turn`` tells apart what is read from what is written.
        """
        if tensor.device.type != "cpu" or type(tensor) is not torch.Tensor:
            return None
        shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
        key = (turn % 2, tensor.dtype)
        held = self._scratch.get(key)
        if held is None or held.numel() < prod(shape):
            held = self._scratch[key] = tensor.new_empty(prod(shape))
        return held[: prod(shape)].view(shape)

    def axis(self, axis: Axis) -> bool:
        found = self._changed.get(id(axis))
        if found is None:
            found = self._changed[id(axis)] = any(leaf in self._keep for leaf in leaves(axis))
        return found

    def any(self, axes: Axes) -> bool:
        return any(map(self.axis, axes))

    def value(self, value: Value) -> bool:
        if isinstance(value, tuple):
            return self.any(value)
        return isinstance(value, list) and any(map(self.value, value))

    def positions(self, axis: Axis) -> Indices:
        found = self._positions.get(id(axis))
        if found is None:
            found = self._positions[id(axis)] = kept_positions(axis, self._keep)
        return found


def _checked(typing: Typing, keep: Mapping[Atom, Indices]) -> dict[Atom, Indices]:
    groups = {g.atom: g for g in typing.groups}
    checked: dict[Atom, Indices] = {}
    for atom, indices in keep.items():
        group = groups.get(atom)
        if group is None:
            raise PassError(f"{atom!r} is not a free group of this graph; keep sets may only name free groups")
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise PassError(
                f"the keep set of {group.name} must be a row of indices within 0..{group.size - 1}; "
                f"found {given.dtype} "
                f"entries of shape {given.shape}: of a mask pass numpy.flatnonzero(mask), of a number of indices which"
            )
        kept = given.astype(np.int64)
        if len(kept) == 0 or kept[0] < 0 or kept[-1] >= group.size or (np.diff(kept) <= 0).any():
            raise PassError(
                f"the keep set of {group.name} must be sorted, unique, not empty and within 0..{group.size - 1}; "
                f"it starts {kept[:5].tolist()} and has {kept.size} entries"
            )
        if len(kept) < group.least:
            raise PassError(
                f"the keep set of {group.name} must hold {group.least} indices at least, since an operator takes so "
                f"many of them by their values; it has {len(kept)}"
            )
        if len(kept) < group.size:
            checked[atom] = kept
    return checked


def _axes_of(typing: Typing, old_of: Mapping[fx.Node, fx.Node], node: fx.Node) -> Value:
    return typing.values[old_of[node]]


def _resized(spec: Spec, value: Value, sizes: Mapping[Atom, int]) -> Spec:
    if isinstance(spec, TensorSpec) and isinstance(value, tuple):
        return spec.resized(tuple(size_of(a, sizes) for a in value))
    if isinstance(spec, tuple) and isinstance(value, list):
        return tuple(_resized(s, v, sizes) for s, v in zip(spec, value, strict=True))
    return spec

"""Write the masked reference of a pruning as a graph of its own, for runtimes that run whole graphs.

What may live here: :func:`masked_graph`, of the ONNX dialect. The reference computes what the typed graph computes
with the parameters of every removed index set to zero; what normalises over removed indices sees the kept ones alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.axes.algebra import Atom, Axis, Indices, kept_positions, leaves
from graphopt.axes.infer import Axes, Resizer, Typing, Value
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read
from graphopt.graph import SPEC, Call, Graph, TensorSpec, tensor_spec

__all__ = ["masked_graph"]


def masked_graph(typing: Typing, keep: Mapping[Atom, Indices]) -> Graph | None:
    """Return the masked reference as a graph of ONNX operators; None where it cannot be one.

    That is where a node that normalises over removed indices reads or yields positions of them.
    """
    keep = {atom: kept for atom, kept in keep.items() if len(kept) < atom.size}
    graph = typing.graph.clone()
    _mask(graph, typing, keep)
    old_of = dict(zip(graph.nodes, typing.graph.nodes, strict=True))
    for node, old in list(old_of.items()):
        affected = {atom: keep[atom] for atom in typing.normalising.get(old, frozenset()) & keep.keys()}
        if not affected:
            continue
        if any(typing.positions.get(each) is not None for each in (old, *old.all_input_nodes)):
            return None
        _OnKept(graph, typing, affected, old_of).put(node, old)
    graph.module.recompile()
    return graph


def _mask(graph: Graph, typing: Typing, keep: Mapping[Atom, Indices]) -> None:
    for name, axes in typing.tensors.items():
        tensor = graph.tensor(name)
        if not isinstance(tensor, torch.nn.Parameter):
            continue
        value = tensor.detach()
        for dim, axis in enumerate(axes):
            kept = _kept(axis, keep)
            if kept is not None:
                removed = np.setdiff1d(np.arange(axis.size), kept)
                value = value.index_fill(dim, torch.from_numpy(removed), 0)
        if value is not tensor:
            graph.set_tensor(name, torch.nn.Parameter(value, requires_grad=False))


def _kept(axis: Axis, keep: Mapping[Atom, Indices]) -> Indices | None:
    return kept_positions(axis, keep) if any(leaf in keep for leaf in leaves(axis)) else None


class _OnKept:
    """Let one node see the kept indices of its operands alone, with zeros in its result where indices were removed."""

    def __init__(
        self, graph: Graph, typing: Typing, keep: Mapping[Atom, Indices], old_of: dict[fx.Node, fx.Node]
    ) -> None:
        self.graph = graph
        self.typing = typing
        self.keep = keep
        self.old_of = old_of

    def put(self, node: fx.Node, old: fx.Node) -> None:
        """Put the node between what gathers its operands and what spreads its results."""
        for operand, before in zip(node.all_input_nodes, old.all_input_nodes, strict=True):
            axes = self.typing.values[before]
            if isinstance(axes, tuple):
                gathered = self._gathered(operand, axes, node)
                if gathered is not operand:
                    self.old_of[gathered] = before
                    node.replace_input_with(operand, gathered)
        entry = self.typing.operators[node.target]
        if entry.resize is not None:
            entry.resize(Resizer(self.keep, self._axes_of, self.typing.facts.get(old)), Call(node))
        node.meta[SPEC] = self._resized(node.meta[SPEC], self.typing.values[old])
        if isinstance(node.meta[SPEC], tuple):
            for user in [u for u in node.users if u.target is operator.getitem]:
                index: Any = user.args[1]
                user.meta[SPEC] = node.meta[SPEC][index]
                self._spread(user, self.typing.values[self.old_of[user]])
        else:
            self._spread(node, self.typing.values[old])

    def _axes_of(self, node: fx.Node) -> Value:
        return self.typing.values[self.old_of[node]]

    def _resized(self, spec: Any, value: Value) -> Any:
        if isinstance(spec, tuple) and isinstance(value, list):
            return tuple(self._resized(s, v) for s, v in zip(spec, value, strict=True))
        if isinstance(spec, TensorSpec) and isinstance(value, tuple):
            kept = [_kept(axis, self.keep) for axis in value]
            return spec.resized(tuple(n if k is None else len(k) for n, k in zip(spec.shape, kept, strict=True)))
        return spec

    def _gathered(self, value: fx.Node, axes: Axes, before: fx.Node) -> fx.Node:
        for dim, axis in enumerate(axes):
            kept = _kept(axis, self.keep)
            if kept is not None:
                value = self._gather(value, dim, kept, before)
        return value

    def _gather(self, value: fx.Node, dim: int, positions: Indices, before: fx.Node) -> fx.Node:
        name = add_tensor(self.graph, "positions", torch.from_numpy(positions), persistent=False)
        shape = list(tensor_spec(value).shape)
        shape[dim] = len(positions)
        indices = read(self.graph, name, before)
        spec = tensor_spec(value).resized(tuple(shape))
        return insert(self.graph, before, op("Gather"), (value, indices), {"axis": dim}, like=value, spec=spec)

    def _spread(self, node: fx.Node, axes: Value) -> None:
        """Put a zero behind the last index of each dimension that lost some, and take it wherever one was removed."""
        readers = list(node.users)
        found, after = node, node.next
        for dim, axis in enumerate(axes if isinstance(axes, tuple) else ()):
            kept = _kept(axis, self.keep)
            if kept is None:
                continue
            shape = list(tensor_spec(found).shape)
            shape[dim] += 1
            pads = [0] * (2 * len(shape))
            pads[len(shape) + dim] = 1
            spec = tensor_spec(found).resized(tuple(shape))
            found = insert(self.graph, after, op("Pad"), (found, pads), like=found, spec=spec)
            positions = np.full(axis.size, len(kept), dtype=np.int64)
            positions[kept] = np.arange(len(kept))
            found = self._gather(found, dim, positions, after)
        if found is not node:
            for reader in readers:
                reader.replace_input_with(node, found)

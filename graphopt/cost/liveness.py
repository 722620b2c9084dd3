"""Say which nodes of a graph allocate memory, and from when to when each allocation lives.

What may live here: the reading of operators' alias annotations, and liveness over the node order. Nothing here knows
sizes.

A node allocates what it returns, except

- a view: an operator whose schema says that its result aliases an argument, ``reshape``, ``contiguous`` and ``to``
  included; of these only a change of element type allocates;
- an operator that works in place, which returns its argument;
- ``getitem``, which picks one of several results;
- an operator that does nothing outside training, such as dropout.

An allocation lives from the node that makes it to the last node that reads it or a view of it. The graph's inputs live
from the beginning. Kernels' scratch memory is not counted.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import fx

from graphopt.graph import Graph, Spec, TensorSpec, spec_of

__all__ = ["Allocation", "allocations"]


@dataclass(slots=True)
class Allocation:
    """Memory that ``node`` allocates, live from step ``first`` to step ``last``, both included.

    A step is a node's place in the execution order.
    """

    node: fx.Node
    first: int
    last: int


def allocations(graph: Graph) -> list[Allocation]:
    """Return every allocation of one run, in execution order; the graph's inputs are among them."""
    found: dict[fx.Node, Allocation] = {}
    owners: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for step, node in enumerate(graph.nodes):
        for argument in node.all_input_nodes:
            for owner in owners.get(argument, ()):
                found[owner].last = step
        if node.op in ("get_attr", "output") or not _holds_tensor(spec_of(node)):
            continue
        shared = [owner for argument in _aliased(node) for owner in owners.get(argument, ())]
        if node.op != "placeholder" and _only_aliases(node):
            owners[node] = tuple(dict.fromkeys(shared))
            continue
        found[node] = Allocation(node, 0 if node.op == "placeholder" else step, step)
        owners[node] = (node, *dict.fromkeys(shared))
    return list(found.values())


_IDLE_IN_EVALUATION: Final = frozenset({"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"})


def _holds_tensor(spec: Spec) -> bool:
    if isinstance(spec, tuple):
        return any(map(_holds_tensor, spec))
    return isinstance(spec, TensorSpec)


def _only_aliases(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    names, everything = _aliases(node.target)
    if not (names and everything):
        return False
    source = next(iter(_aliased(node)), None)
    before, after = spec_of(source) if source is not None else None, spec_of(node)
    # A conversion aliases only where it converts nothing.
    return not (isinstance(before, TensorSpec) and isinstance(after, TensorSpec) and _converts(before, after))


def _converts(before: TensorSpec, after: TensorSpec) -> bool:
    return before.dtype != after.dtype and before.shape == after.shape


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory the node's results may share."""
    if node.target is operator.getitem:
        return [a for a in node.args[:1] if isinstance(a, fx.Node)]
    found: list[fx.Node] = []
    for name, position in _aliases(node.target)[0]:
        value: Any = node.kwargs.get(name, node.args[position] if position < len(node.args) else None)
        values = value if isinstance(value, list | tuple) else [value]
        found.extend(v for v in values if isinstance(v, fx.Node))
    return found


@lru_cache(maxsize=4096)
def _aliases(target: Any) -> tuple[tuple[tuple[str, int], ...], bool]:
    """Return the arguments, by name and position, that results alias, and whether every result aliases one."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return (), False
    if isinstance(target, torch._ops.OpOverload) and target._opname in _IDLE_IN_EVALUATION:
        return ((schema.arguments[0].name, 0),), True
    results = [result.alias_info for result in schema.returns]
    names: list[tuple[str, int]] = []
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        # A list of views has no set of its own; its argument's set is widened to the wildcard instead.
        if info and any(r and (r.before_set & info.before_set or not r.before_set) for r in results):
            names.append((argument.name, position))
    return tuple(names), bool(results) and all(results)

"""Say which values of a graph may share memory, and which calls write into it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import fx

from graphopt.graph import Graph

aten = torch.ops.aten

NO_WRITES: Final = frozenset({aten.detach_.default})
"""Operators whose schema says that they write, and which change no entry."""


def written(node: fx.Node) -> list[fx.Node]:
    """Return the tensor arguments that a call writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or node.target in NO_WRITES:
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            found += [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, fx.Node)]
    return found


def source(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory the call's result may be, or be a part of; ``None`` if it has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return node.args[0]  # type: ignore[return-value]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return None
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                return value
    return None


def root(node: fx.Node) -> fx.Node:
    """Return the value in whose memory a node's result may lie."""
    while (before := source(node)) is not None:
        node = before
    return node


def roots(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return the :func:`root` of each of all nodes of a graph, in order, in one sweep."""
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        before = source(node)
        found[node] = node if before is None else found[before]
    return found


def family(node: fx.Node) -> Iterator[fx.Node]:
    """Yield every value that may share memory with ``node``, the root first."""
    waiting = [root(node)]
    while waiting:
        each = waiting.pop()
        yield each
        waiting += [user for user in each.users if source(user) is each]


class _Pointers(fx.Interpreter):
    """Run a graph and note where each tensor lies. Nothing is freed, so that no memory is used twice."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = value.untyped_storage().data_ptr()
        return value


def memory(graph: Graph, flat_inputs: list[Any]) -> dict[fx.Node, int]:
    """Run ``graph`` and return the address of the memory that each tensor lies in."""
    pointers = _Pointers(graph)
    with torch.no_grad():
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat_inputs]
        pointers.run(*own, enable_io_processing=False)
    return pointers.found

"""Say when one value may stand for another although calls write into memory.

What may live here: the order of writes of a graph, and which results are returned.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from torch import fx

from graphopt.aliases import roots, source, written
from graphopt.graph import Graph

__all__ = ["Memory"]


class Memory:
    """Follow, while a pass edits the graph, which values share memory, who writes into it and when.

    Values whose memory becomes one are joined (:meth:`join`), so that answers stay right after an edit. Nodes that are
    inserted take the place in time of the node they replace.
    """

    def __init__(self, graph: Graph) -> None:
        """Read the graph once."""
        self._time = {node: time for time, node in enumerate(graph.nodes)}
        self._root = roots(graph.nodes)
        self._joined: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        self._writers: dict[int, fx.Node] = {}
        for node in graph.nodes:
            for target in written(node):
                self._writes.setdefault(self._root[target], []).append(self._time[node])
                self._writers[self._time[node]] = node
        self._returned = {self.root(node) for node in graph.module.graph.output_node().all_input_nodes}

    def root(self, node: fx.Node) -> fx.Node:
        """Return the value in whose memory the node's result may lie."""
        found = first = self._root[node]
        while found in self._joined:
            found = self._joined[found]
        while first is not found:  # the next question is answered at once
            following = self._joined[first]
            self._joined[first], first = found, following
        return found

    def join(self, node: fx.Node, value: fx.Node) -> None:
        """Note that readers of ``node`` read ``value`` from now on."""
        a, b = self.root(node), self.root(value)
        if a is b:
            return
        self._joined[a] = b
        self._writes[b] = sorted({*self._writes.get(a, ()), *self._writes.get(b, ())})
        if a in self._returned:
            self._returned.add(b)

    def insert(self, new: fx.Node, place: fx.Node) -> None:
        """Note that the call ``new`` takes the place of ``place``."""
        self._time[new] = self._time[place]
        before = source(new)
        self._root[new] = new if before is None else self._root[before]

    def is_returned(self, node: fx.Node) -> bool:
        """Say whether the node's result, or a part of it, may be what the graph returns."""
        return self.root(node) in self._returned

    def writer_after(self, node: fx.Node, value: fx.Node) -> fx.Node | None:
        """Return the first call that writes into ``value``'s memory after ``node`` runs."""
        writes = self._writes.get(self.root(value), [])
        position = bisect_right(writes, self._time[node])
        return self._writers[writes[position]] if position < len(writes) else None

    def writer_between(self, value: fx.Node, earlier: fx.Node, later: fx.Node) -> fx.Node | None:
        """Return a call that writes into ``value``'s memory after ``earlier`` runs and before ``later`` does."""
        found = self.writer_after(earlier, value)
        return found if found is not None and self._time[found] < self._time[later] else None

    def why_not(self, node: fx.Node, value: fx.Node) -> str | None:
        """Say why ``value`` cannot stand for ``node``, a copy of it, because somebody would notice that it is none."""
        if _is_view_of(node, value):
            return None  # and so nobody can tell them apart
        for each in (node, value):
            writer = self.writer_after(node, each)
            if writer is not None:
                return f"{writer.name} writes into {each.name} later, which the other must not see"
        # A caller that writes into a result must not change an input, a weight or another result.
        if self.is_returned(node) and (self.root(value).op != "call_function" or self._returned_apart(node, value)):
            return f"it is returned, and {self.root(value).name} must not share its memory"
        return None

    def _returned_apart(self, node: fx.Node, value: fx.Node) -> bool:
        return self.root(node) is not self.root(value) and self.is_returned(value)


_MAY_COPY: Final = frozenset({"contiguous", "to", "reshape", "reshape_as", "flatten"})
"""Operators whose result is a view or a copy, as the layout and the type have it."""


def _is_view_of(node: fx.Node, value: fx.Node) -> bool:
    while node is not value:
        before = source(node)
        if before is None or getattr(node.target, "_opname", "") in _MAY_COPY:
            return False
        node = before
    return True

"""Say what ties the dimensions of a typed graph: the coupling as a networkx graph that answers *why*.

What may live here: :class:`CouplingGraph`, its explanations and its drawings. What coupled groups are stands in
``groups``, how they are found in ``infer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import networkx as nx
from torch import fx

from graphopt.axes.algebra import Atom, Axis, Concat, Product, Reason, leaves, resolve
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing, Value


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an explanation: an operator, and the dimensions it ties, written ``name[dim]``."""

    operator: str
    enters: str
    leaves: str

    def __str__(self) -> str:
        return f"{self.operator} ties {self.enters} with {self.leaves}"


@dataclass(frozen=True, slots=True)
class Tie:
    """Why one factor of a dimension goes with other places, or cannot go at all.

    ``frozen`` is the reason when it must stay whole; ``group`` the group otherwise, with the way to each other place.
    """

    axis: str
    size: int
    group: Group | None
    frozen: Reason | None
    paths: tuple[tuple[str, tuple[Step, ...]], ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that ties one dimension of one tensor, factor by factor."""

    tensor: str
    dim: int
    size: int
    axis: str
    ties: tuple[Tie, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.tensor}[{self.dim}] has {self.size} positions: {self.axis}"
        for tie in self.ties:
            if tie.frozen is not None:
                yield f"- {tie.axis} ({tie.size}) must stay whole: {tie.frozen.text}, at {tie.frozen.node}"
            elif tie.group is not None:
                norm = f", normalised over by {', '.join(tie.group.normalised)}" if tie.group.normalised else ""
                yield f"- {tie.axis} ({tie.size} {tie.group.role}) goes with {len(tie.paths)} other places{norm}"
            else:
                yield f"- {tie.axis} ({tie.size}) belongs to no parameter that could lose it"
            for place, steps in tie.paths:
                yield f"    {place}"
                for step in steps:
                    yield f"      {step}"


class CouplingGraph:
    """The coupling of a typed graph as a networkx graph.

    Nodes are dimensions (``kind="dimension"``, of tensors and of values), operators (``kind="operator"``) and groups
    (``kind="group"``); an edge says that an operator touches a dimension, and its ``atoms`` which indices it carries
    through. Two dimensions are coupled when a path of edges with a common atom joins them.
    """

    def __init__(self, typing: Typing) -> None:
        """Build the graph of ``typing``; linear in the number of operands and dimensions."""
        self.typing = typing
        self.nx: nx.Graph = nx.Graph()
        self._symbols: dict[Atom, str] = {}
        self._groups = {g.atom: g for g in typing.groups}
        for node in typing.graph.nodes:
            if node.op in ("call_function", "output"):
                self._add_operator(node)
        for group in typing.groups:
            self.nx.add_node(f"group {group.name}", kind="group", label=f"{group.role} {group.size}", size=group.size)
            for place in group.places:
                self._add_dimension(str(place))
                self.nx.add_edge(f"group {group.name}", str(place), atoms=self.symbol(group.atom))

    def symbol(self, atom: Atom) -> str:
        """Return a short name of an atom, the same within this graph."""
        return self._symbols.setdefault(atom, f"a{len(self._symbols)}")

    def explain(self, tensor: str, dim: int) -> Explanation:
        """Say what ties dimension ``dim`` of ``tensor``, or forbids that it shrinks.

        Raises:
            KeyError: no such tensor in the graph, or no such dimension.
        """
        axes = self.typing.tensors[tensor]
        if not -len(axes) <= dim < len(axes):
            raise KeyError(dim)
        dim %= len(axes)
        axis = axes[dim]
        ties = tuple(self._tie(f"{tensor}[{dim}]", leaf) for leaf in dict.fromkeys(leaves(axis)))
        return Explanation(tensor, dim, axis.size, self.spell(axis), ties)

    def spell(self, axis: Axis) -> str:
        """Write an axis expression with the graph's symbols and sizes."""
        if isinstance(axis, Atom) and axis.bound is None:
            return f"{self.symbol(axis)}:{axis.size}{' (fixed)' if axis.frozen else ''}"
        axis = resolve(axis)
        if isinstance(axis, Product):
            return "(" + " x ".join(self.spell(f) for f in axis.factors) + ")" if axis.factors else "1"
        if isinstance(axis, Concat):
            return "(" + " | ".join(self.spell(p) for p in axis.parts) + ")"
        return self.spell(axis)

    def write_graphml(self, path: str | PathLike[str]) -> None:
        """Write the graph as GraphML, for yEd, Gephi or networkx itself."""
        nx.write_graphml(self.nx, path)

    def dot(self) -> str:
        """Return the graph in the DOT language: boxes are operators, ellipses dimensions, hexagons groups."""
        shapes = {"operator": "box", "dimension": "ellipse", "group": "hexagon"}
        lines = ["graph coupling {", "  node [fontname=Helvetica fontsize=10];"]
        for name, data in self.nx.nodes(data=True):
            lines.append(f"  {_quote(name)} [shape={shapes[data['kind']]} label={_quote(data.get('label', name))}];")
        lines.extend(
            f"  {_quote(a)} -- {_quote(b)} [label={_quote(data['atoms'])}];" for a, b, data in self.nx.edges(data=True)
        )
        return "\n".join([*lines, "}", ""])

    # -- building and searching --

    def _add_dimension(self, name: str) -> None:
        self.nx.add_node(name, kind="dimension", label=name)

    def _add_operator(self, node: fx.Node) -> None:
        name = f"operator {node.name}"
        self.nx.add_node(name, kind="operator", label=f"{node.name}: {node.target}")
        for operand in (*node.all_input_nodes, *((node,) if node.op == "call_function" else ())):
            for dimension, axis in _dimensions(operand, self.typing.values.get(operand)):
                symbols = " ".join(self.symbol(leaf) for leaf in dict.fromkeys(leaves(axis)))
                if symbols:
                    self._add_dimension(dimension)
                    self.nx.add_edge(name, dimension, atoms=symbols)

    def _tie(self, start: str, leaf: Atom) -> Tie:
        group = self._groups.get(leaf)
        symbol = self.symbol(leaf)
        carried = nx.subgraph_view(
            self.nx,
            filter_node=lambda n: self.nx.nodes[n]["kind"] != "group",
            filter_edge=lambda a, b: symbol in self.nx.edges[a, b]["atoms"].split(" "),
        )
        found = nx.single_source_shortest_path(carried, start) if start in carried else {}
        paths: tuple[tuple[str, tuple[Step, ...]], ...]
        if leaf.frozen is not None:
            end = f"operator {leaf.frozen.node}"
            paths = ((leaf.frozen.node, _steps(found[end])),) if end in found else ()
        else:
            ends = [str(p) for p in group.places if str(p) != start] if group is not None else []
            paths = tuple((end, _steps(found.get(end, ()))) for end in ends)
        return Tie(symbol, leaf.size, group, leaf.frozen, paths)


def _dimensions(node: fx.Node, value: Value) -> Iterator[tuple[str, Axis]]:
    """Yield the dimensions of a value by name; a tensor's are named after the tensor, not the node that reads it."""
    name = str(node.target) if node.op == "get_attr" else node.name
    if isinstance(value, tuple):
        for dim, axis in enumerate(value):
            yield f"{name}[{dim}]", axis
    elif isinstance(value, list):
        for i, part in enumerate(value):
            if isinstance(part, tuple):
                for dim, axis in enumerate(part):
                    yield f"{name}.{i}[{dim}]", axis


def _steps(path: Sequence[str]) -> tuple[Step, ...]:
    """Read a path of alternating dimensions and operators as steps."""
    steps = []
    for i in range(0, len(path) - 1, 2):
        operator = path[i + 1].removeprefix("operator ")
        steps.append(Step(operator, path[i], path[i + 2] if i + 2 < len(path) else operator))
    return tuple(steps)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""Bring the graphs of an ONNX model in order, or say what is wrong with them.

What may live here: what can be told from names alone. Every value has one name and one origin, nodes come after what
they read, every node has a name, initializers are no inputs. What an operator takes and yields, the checker of onnx
knows; see ``library``.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from graphopt.capture.onnx.weights import Weights, short, type_name, type_of
from graphopt.dialects.onnx.operators import DOMAIN, MICROSOFT
from graphopt.errors import CaptureError, nearest_name

if TYPE_CHECKING:
    import onnx

__all__ = ["DEPTH_LIMIT", "INPUT_LIMIT", "NODE_LIMIT", "Order", "attribute_graphs", "describe", "walk"]

DEPTH_LIMIT: Final = 16
"""Most graphs inside graphs (bodies of If, Loop, Scan). Exporters nest two or three."""

NODE_LIMIT: Final = 1_000_000
"""Most nodes of a model, its functions inlined. Language models of a hundred layers have some ten thousand."""

INPUT_LIMIT: Final = 1 << 31
"""Most entries that an input may declare: examples of inputs are made from what is declared."""

_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys, apart from tabs and ends of lines."""

_ALIAS: Final = "ai.onnx"


def describe(node: onnx.NodeProto, position: int | None = None) -> str:
    """Return what messages call a node."""
    if node.name:
        label = f"'{short(node.name)}'"
    elif any(node.output):
        label = f"that makes '{short(next(filter(None, node.output)))}'"
    else:
        label = f"number {position}" if position is not None else "without a name"
    return f"node {label} ({short(node.op_type) or 'no operator'})"


def attribute_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and after each those of the graphs that it holds."""
    pending = [iter(nodes)]
    while pending:
        node = next(pending[-1], None)
        if node is None:
            pending.pop()
            continue
        yield node
        for graph in attribute_graphs(node):
            pending.append(iter(graph.node))


@dataclass
class Order:
    """Examine the graphs of a model, and order them in place.

    Args:
        weights: reads the model's tensors; knows what messages call the model.
        domains: the model's functions, as pairs of domain and name.
    """

    weights: Weights
    functions: Set[tuple[str, str]] = frozenset()
    notes: list[str] = field(default_factory=list)

    def model(self, model: onnx.ModelProto) -> None:
        """Examine and order all graphs.

        Raises:
            CaptureError: if a graph is none.
        """
        graph = model.graph
        self._count(graph)
        for text, of in (
            (graph.name, "name of the graph"),
            *((getattr(model, name), name) for name in ("producer_name", "producer_version", "domain", "doc_string")),
            *((text, "metadata") for entry in model.metadata_props for text in (entry.key, entry.value)),
        ):
            self._text(text, f"the {of}", prose=True)
        self._check_inputs(graph)
        self._graph(graph, (), "the graph", 0)
        if not graph.output:
            raise self._error("the graph", "no outputs", "at least one", "declare what the model computes as outputs")
        self._name(graph)

    def _count(self, graph: onnx.GraphProto) -> None:
        if any(True for _ in itertools.islice(walk(graph.node), NODE_LIMIT, None)):
            raise self._error("the graph", f"more than {NODE_LIMIT} nodes", "fewer", "split the model into several")

    def _error(self, culprit: str, found: str, required: str, remedy: str) -> CaptureError:
        return self.weights.error(culprit, found, required, remedy)

    def _text(self, value: Any, what: str, *, prose: bool = False) -> str:
        """Return a text, which is bytes where the file holds none; a name must be printable, prose may have lines.

        Names are printed in tables and messages, where a terminal obeys what is in them.
        """
        if not isinstance(value, str):
            found = "bytes that are no text"
        elif _CONTROL.search(value) if prose else not value.isprintable():
            found = "characters that cannot be printed"
        else:
            return value
        raise self._error(f"{what} '{short(value)}'", found, "printable text in UTF-8", "rename it and save again")

    def _check_inputs(self, graph: onnx.GraphProto) -> None:
        stored = {i.name for i in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
        both = [i.name for i in graph.input if i.name in stored]
        if both:
            kept = [i for i in graph.input if i.name not in stored]
            del graph.input[:]
            graph.input.extend(kept)
            self.notes.append(
                f"{len(both)} initializers are also inputs ({short(both[0])}, ...): they are weights, and no longer "
                "inputs"
                if len(both) > 1
                else f"the initializer {short(both[0])} is also an input: it is a weight, and no longer an input"
            )
        for value in graph.input:
            self._check_input(value)

    def _check_input(self, value: onnx.ValueInfoProto) -> None:
        culprit = f"input '{short(value.name)}'"
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise self._error(
                culprit,
                f"a {kind.removesuffix('_type')}" if kind else "no type",
                "a tensor",
                "declare its element type and shape, or cut the graph behind it",
            )
        tensor = value.type.tensor_type
        if type_of(tensor.elem_type) is None:
            raise self._error(
                culprit,
                f"element type {type_name(tensor.elem_type)}",
                "numbers of a type that torch computes with",
                "cut the graph behind this input",
            )
        count = 1
        for dim in tensor.shape.dim:
            size = dim.dim_value if dim.HasField("dim_value") else 1
            if size == -1:
                dim.ClearField("dim_value")
                self.notes.append(f"{culprit} has a dimension of -1: it may vary")
                size = 1
            if dim.HasField("dim_param"):
                self._text(dim.dim_param, f"the dimension of {culprit}")
            if size < 0:
                raise self._error(
                    culprit, f"a dimension of {size}", "sizes from 0 on", "declare a name for a dimension that varies"
                )
            count *= max(size, 1)
        if count > INPUT_LIMIT or len(tensor.shape.dim) > 64:
            raise self._error(
                culprit,
                f"a shape of {len(tensor.shape.dim)} dimensions and {count} entries",
                f"at most 64 dimensions and {INPUT_LIMIT} entries",
                "declare names for dimensions that vary",
            )

    def _check_types(self, graph: onnx.GraphProto, what: str) -> None:
        """Examine what a graph declares of its values; leave out what says nothing of an inner one."""
        kept = [value for value in graph.value_info if value.name and self._wrong(value) is None]
        if len(kept) < len(graph.value_info):
            self.notes.append(f"{len(graph.value_info) - len(kept)} declarations of values in {what} were left out")
            copies = type(graph)()
            copies.value_info.extend(kept)
            graph.ClearField("value_info")
            graph.value_info.extend(copies.value_info)
        for value in (*graph.input, *graph.output):
            wrong = self._wrong(value)
            if wrong is not None:
                raise self._error(
                    f"the type of '{short(value.name)}' in {what}",
                    wrong,
                    "a known element type, and sizes or names of dimensions",
                    "the file is damaged or was edited: export the model again",
                )

    def _wrong(self, value: onnx.ValueInfoProto) -> str | None:
        """Return what is wrong with a declaration."""
        if not _are_text(value.name, value.doc_string):
            return "bytes that are no text"
        kind = value.type.WhichOneof("value")
        if kind not in ("tensor_type", "sparse_tensor_type"):
            return None
        tensor = getattr(value.type, kind)
        if type_name(tensor.elem_type).startswith("number"):
            return f"element type {type_name(tensor.elem_type)}"
        for dim in tensor.shape.dim:
            if not _are_text(dim.dim_param, dim.denotation):
                return "a name of a dimension that is no text"
            if dim.HasField("dim_value") and dim.dim_value == -1:
                dim.ClearField("dim_value")
            if dim.dim_value < 0:
                return f"a dimension of {dim.dim_value}"
        return None

    def _graph(self, graph: onnx.GraphProto, scopes: tuple[Set[str], ...], what: str, depth: int) -> set[str]:
        """Order a graph and those in it; return the names that it takes from the graphs around it."""
        if depth > DEPTH_LIMIT:
            raise self._error(
                what, f"graphs nested {depth} deep", f"at most {DEPTH_LIMIT}", "inline the bodies of If and Loop"
            )
        self._check_types(graph, what)
        made = self._definitions(graph, scopes, what)
        inner = (*scopes, made)
        reads: list[list[str]] = []
        free: set[str] = set()
        for position, node in enumerate(graph.node):
            names = self._reads(node, inner, position, depth)
            reads.append(names)
            free.update(name for name in names if name not in made)
        self._sort(graph, made, reads, what)
        seen: set[str] = set()
        for value in graph.output:
            name = self._text(value.name, f"an output of {what}")
            if not name or (name not in made and not any(name in scope for scope in scopes)):
                raise self._error(
                    f"output '{short(name)}' of {what}",
                    "nothing that makes it",
                    "an input, an initializer or a node's output of that name",
                    self._hint(name, inner),
                )
            if name in seen and not depth:
                raise self._error(
                    f"output '{short(name)}' of {what}",
                    "two outputs of that name",
                    "outputs of different names",
                    "put an Identity behind one of them",
                )
            seen.add(name)
            if name not in made:
                free.add(name)
        return free

    def _definitions(self, graph: onnx.GraphProto, scopes: tuple[Set[str], ...], what: str) -> set[str]:
        """Return the names that a graph gives to values; each may be given once."""
        made: set[str] = set()

        def define(name: Any, origin: str) -> None:
            self._text(name, origin)
            if not name:
                raise self._error(
                    f"{origin} in {what}", "an empty name", "a name", "name it and all that reads it, and save again"
                )
            if name in made or any(name in scope for scope in scopes):
                around = "" if name in made else " around it"
                raise self._error(
                    f"value '{short(name)}' in {what}",
                    f"{origin}, besides another value of that name{around}",
                    "one origin of every name",
                    "rename one of the two and all that reads it",
                )
            made.add(name)

        for value in graph.input:
            define(value.name, "an input")
        for tensor in graph.initializer:
            self.weights.check(tensor)
            define(tensor.name, "an initializer")
        for sparse in graph.sparse_initializer:
            self.weights.check_sparse(sparse)
            define(sparse.values.name, "a sparse initializer")
        idle = []
        for position, node in enumerate(graph.node):
            for name in node.output:
                if name or not isinstance(name, str):
                    define(name, f"an output of {describe(node, position)}")
            if not any(node.output):
                idle.append(position)
        if idle:
            self.notes.append(f"{len(idle)} nodes without outputs were left out")
            left_out = set(idle)
            kept = [node for position, node in enumerate(graph.node) if position not in left_out]
            _replace(graph, kept)
        return made

    def _reads(self, node: onnx.NodeProto, scopes: tuple[Set[str], ...], position: int, depth: int) -> list[str]:
        """Examine a node and the graphs in it; return the names that both read."""
        culprit = describe(node, position)
        for text, of in ((node.name, "name"), (node.op_type, "operator"), (node.domain, "domain")):
            self._text(text, f"the {of} of {culprit}")
        self._text(node.doc_string, f"the description of {culprit}", prose=True)
        for entry in node.metadata_props:
            for text in (entry.key, entry.value):
                self._text(text, f"the metadata of {culprit}", prose=True)
        if node.domain == _ALIAS:
            node.domain = DOMAIN
        self._check_domain(node, culprit)
        names = []
        for name in node.input:
            if not name:
                continue
            self._text(name, f"an input of {culprit}")
            if not any(name in scope for scope in reversed(scopes)):
                raise self._error(
                    culprit,
                    f"an input '{short(name)}' that nothing makes",
                    "an input of the graph, an initializer or another node's output",
                    self._hint(name, scopes),
                )
            names.append(name)
        given = Counter(attribute.name for attribute in node.attribute)
        for attribute in node.attribute:
            self._text(attribute.name, f"an attribute of {culprit}")
            if given[attribute.name] > 1 or attribute.ref_attr_name:
                raise self._error(
                    culprit,
                    f"the attribute '{short(attribute.name)}' "
                    + ("twice" if given[attribute.name] > 1 else "taken from a function's, outside of a function"),
                    "one value",
                    "remove it, or give it a value",
                )
            self._check_attribute(attribute, culprit)
            if attribute.HasField("g") or attribute.graphs:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    what = f"'{short(attribute.name)}' of {culprit}"
                    names.extend(self._graph(graph, scopes, what, depth + 1))
        return names

    def _check_attribute(self, attribute: onnx.AttributeProto, culprit: str) -> None:
        tensors = [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        for tensor in tensors:
            if tensor.data_type == tensor.STRING and tensor.data_location != tensor.EXTERNAL:
                continue  # text is read by operators that are refused for what they are
            try:
                self.weights.check(tensor)
            except CaptureError as error:
                raise CaptureError(f"{error} (attribute '{short(attribute.name)}' of {culprit})") from error
        for sparse in (
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            *attribute.sparse_tensors,
        ):
            self.weights.check_sparse(sparse)

    def _check_domain(self, node: onnx.NodeProto, culprit: str) -> None:
        if not node.op_type:
            raise self._error(culprit, "no operator", "the name of an operator", "the file is damaged: save it again")
        if node.domain in (DOMAIN, MICROSOFT) or (node.domain, node.op_type) in self.functions:
            return
        if node.domain == "ai.onnx.ml":
            remedy = "classical models (trees, support vectors) are not read: cut them from the graph"
        else:
            remedy = "export the model with standard operators, or with the operator as a model-local function"
        raise self._error(
            culprit,
            f"the operator '{short(node.op_type)}' of the domain '{short(node.domain)}'",
            f"an operator of ai.onnx, {MICROSOFT} or one of the model's own functions",
            remedy,
        )

    def _hint(self, name: Any, scopes: tuple[Set[str], ...]) -> str:
        # Looking for names that are alike takes time that grows with their number and length.
        names = set(itertools.islice(itertools.chain(*reversed(scopes)), 500))
        nearest = nearest_name(short(name), map(short, names))
        return (f"did you mean '{nearest}'? " if nearest else "") + "Declare it as an input, or export the model again"

    def _sort(self, graph: onnx.GraphProto, made: Set[str], reads: list[list[str]], what: str) -> None:
        """Put nodes behind what they read; those in order already stay in their order."""
        origin = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
        before = [{origin[name] for name in names if name in origin} for names in reads]
        if all(not ancestors or max(ancestors) < position for position, ancestors in enumerate(before)):
            return
        readers: list[list[int]] = [[] for _ in before]
        for position, ancestors in enumerate(before):
            for ancestor in ancestors:
                readers[ancestor].append(position)
        waiting = [len(ancestors) for ancestors in before]
        ready = [position for position, count in enumerate(waiting) if not count]
        order = []
        while ready:
            position = heapq.heappop(ready)
            order.append(position)
            for reader in readers[position]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    heapq.heappush(ready, reader)
        if len(order) < len(before):
            raise self._error(
                what,
                f"a cycle of nodes: {self._cycle(graph, before, waiting)}",
                "nodes that do not wait for their own outputs",
                "cut the cycle, or express it with Loop or Scan",
            )
        _replace(graph, [graph.node[position] for position in order])
        self.notes.append(f"the nodes of {what} were put in order")

    def _cycle(self, graph: onnx.GraphProto, before: list[set[int]], waiting: list[int]) -> str:
        """Return one cycle in words: from a node that waits, go from what it waits for to what that waits for."""
        position = next(p for p, count in enumerate(waiting) if count)
        path: list[int] = []
        at: dict[int, int] = {}
        while position not in at:
            at[position] = len(path)
            path.append(position)
            position = min(p for p in before[position] if waiting[p])
        cycle = [describe(graph.node[p], p) for p in path[at[position] :]]
        return " <- ".join(cycle[:4] + (["..."] if len(cycle) > 4 else []) + cycle[:1])

    def _name(self, graph: onnx.GraphProto) -> None:
        """Give every node a name of its own: that of its operator, and a number where need be."""
        nodes = list(walk(graph.node))
        taken = {node.name for node in nodes}
        seen: set[str] = set()
        counts: Counter[str] = Counter()
        renamed = 0
        for node in nodes:
            if node.name and node.name not in seen:
                seen.add(node.name)
                continue
            renamed += bool(node.name)
            base = node.name or node.op_type
            while (name := f"{base}_{counts[base]}") in taken:
                counts[base] += 1
            node.name = name
            taken.add(name)
            seen.add(name)
        if renamed:
            self.notes.append(f"{renamed} nodes had the name of another node: a number was added")


def _are_text(*values: Any) -> bool:
    """Say whether strings of the file are in UTF-8; others come as bytes."""
    return all(isinstance(value, str) for value in values)


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Let a graph hold these of its nodes, in this order."""
    copies = type(graph)()
    copies.node.extend(nodes)
    graph.ClearField("node")
    graph.node.extend(copies.node)

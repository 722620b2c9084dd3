"""Count what a model becomes when its own functions are inlined, before that is done.

A chain of functions each of which calls the next one twice doubles with every link, so that a file of a kilobyte holds
more nodes than there is memory for. The count is one pass over the functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from graphopt.capture.onnx.structure import DEPTH_LIMIT, NODE_LIMIT, attribute_graphs, describe, walk
from graphopt.capture.onnx.weights import Weights, short

if TYPE_CHECKING:
    import onnx

__all__ = ["BYTE_LIMIT", "check_functions"]

BYTE_LIMIT: Final = 1 << 30
"""Most bytes of nodes after inlining, constants in them included."""

Key = tuple[str, str]


def check_functions(model: onnx.ModelProto, weights: Weights) -> None:
    """Examine the functions of a model.

    Raises:
        CaptureError: if two have one name, one calls itself by any way, a call gives more than a function takes, or
            inlining would go beyond :data:`~graphopt.capture.onnx.structure.NODE_LIMIT`.
    """
    if not model.functions:
        return
    functions: dict[Key, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name)
        if key in functions or function.overload or not all(isinstance(part, str) and part for part in key):
            raise weights.error(
                f"function '{short(function.domain)}.{short(function.name)}'",
                "another function of that name" if key in functions else "no domain or name, or an overload",
                "functions that domain and name tell apart",
                "rename one, or inline the functions with onnx.inliner",
            )
        functions[key] = function
    sizes: dict[Key, tuple[int, int, int]] = {}
    open_calls: list[Key] = []

    def size(key: Key) -> tuple[int, int, int]:
        """Return nodes, bytes and depth of a function with all that it calls."""
        if key in sizes:
            return sizes[key]
        if key in open_calls:
            cycle = [*open_calls[open_calls.index(key) :], key]
            raise weights.error(
                f"function '{short(key[0])}.{short(key[1])}'",
                "a function that calls itself: " + " -> ".join(short(name, 40) for _, name in cycle[:6]),
                "functions without recursion",
                "express the repetition with Loop or Scan",
            )
        if len(open_calls) > 200:
            raise weights.error(
                f"function '{short(key[0])}.{short(key[1])}'",
                "functions that call each other 200 deep",
                "fewer",
                "inline the functions with onnx.inliner",
            )
        open_calls.append(key)
        sizes[key] = expanded(functions[key].node, f"function '{short(key[0])}.{short(key[1])}'")
        open_calls.pop()
        return sizes[key]

    def expanded(nodes: Sequence[onnx.NodeProto], what: str) -> tuple[int, int, int]:
        count, nbytes, depth = 0, sum(node.ByteSize() for node in nodes), 0
        calls: Counter[Key] = Counter()
        for node in walk(nodes):
            count += 1
            key = (node.domain, node.op_type)
            if key in functions:
                calls[key] += 1
                called = functions[key]
                if len(node.input) > len(called.input) or len(node.output) > len(called.output):
                    raise weights.error(
                        f"{describe(node)} in {what}",
                        f"{len(node.input)} inputs and {len(node.output)} outputs",
                        f"at most {len(called.input)} and {len(called.output)}, which the function has",
                        "export the model again",
                    )
        for key, times in calls.items():
            inner = size(key)
            count += times * inner[0]
            nbytes += times * inner[1]
            depth = max(depth, inner[2])
        depth += _nesting(nodes)
        if count > NODE_LIMIT or nbytes > BYTE_LIMIT or depth > DEPTH_LIMIT:
            raise weights.error(
                what,
                f"{count:.3g} nodes, {nbytes:.3g} bytes, graphs {depth} deep once its functions are inlined",
                f"at most {NODE_LIMIT} nodes, {BYTE_LIMIT} bytes and {DEPTH_LIMIT} graphs in graphs",
                "do not use the file unless you know who made it; split the model, or leave functions out",
            )
        return count, nbytes, depth

    for key in functions:
        size(key)
    expanded(model.graph.node, "the graph")


def _nesting(nodes: Sequence[onnx.NodeProto]) -> int:
    """Return how deep graphs are nested in the attributes of nodes."""
    depth = 0
    level = [graph for node in nodes for graph in attribute_graphs(node)]
    while level:
        depth += 1
        level = [inner for graph in level for node in graph.node for inner in attribute_graphs(node)]
    return depth

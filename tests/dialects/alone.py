"""Check one operator in a graph of its own: its axes, which zeros survive it, and that its call follows a pruning."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.axes.algebra import Atom, Indices, index_at
from graphopt.axes.infer import Typing
from graphopt.dialects.onnx.operators import Op
from graphopt.graph import SPEC, Graph, TensorSpec, TraceModule, set_tensor
from tests.dialects.checks import zeroed

aten = torch.ops.aten


@dataclass(frozen=True)
class P:
    """A floating-point operand of this shape with entries from ``low``: a parameter or a buffer, as a test decides."""

    shape: tuple[int, ...]
    low: float = -0.5

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return its values."""
        return torch.rand(self.shape, generator=generator, dtype=torch.float64) + self.low


def build(target: Any, sample: Any, vanish: tuple[bool, ...]) -> Graph:
    """Make a graph of one call whose result is summed; operands are parameters where they vanish, buffers elsewhere."""
    module = TraceModule(nn.Module(), fx.Graph())
    if isinstance(target, Op):
        module.meta["onnx"] = None
    generator = torch.Generator().manual_seed(0)
    graph = fx.Graph(owning_module=module)
    seen: dict[int, fx.Node] = {}

    def tensor(value: Any) -> Any:
        if not isinstance(value, P | Tensor):
            return value
        if id(value) in seen:
            return seen[id(value)]
        name = f"t{len(seen)}"
        found = value.draw(generator) if isinstance(value, P) else value
        is_parameter = isinstance(value, P) and vanish[sum(isinstance(v, P) for v in kept)]
        kept.append(value)
        set_tensor(module, name, nn.Parameter(found) if is_parameter else found)
        node = graph.get_attr(name)
        node.meta[SPEC] = TensorSpec.of(found)
        if target._schema.is_mutable:
            node = graph.call_function(aten.clone.default, (node,))
            node.meta[SPEC] = TensorSpec.of(found)
        values[node] = found
        seen[id(value)] = node
        return node

    kept: list[Any] = []
    values: dict[fx.Node, Tensor] = {}
    args, kwargs = pytree.tree_map(tensor, (sample.args, sample.kwargs), is_leaf=lambda v: isinstance(v, P))
    call = graph.call_function(target, args, kwargs)
    found = target(
        *fx.node.map_arg(args, lambda n: values[n].clone()), **fx.node.map_arg(kwargs, lambda n: values[n].clone())
    )
    if isinstance(found, Tensor):
        call.meta[SPEC] = TensorSpec.of(found)
        results = [call]
    else:
        call.meta[SPEC] = tuple(TensorSpec.of(each) for each in found)
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(found))]
        for node, each in zip(results, found, strict=True):
            node.meta[SPEC] = TensorSpec.of(each)
    sums = []
    for node in results:
        if node.meta[SPEC].dtype.is_floating_point or node.meta[SPEC].dtype in (torch.int8, torch.uint8):
            square = graph.call_function(aten.square.default, (node,))
            square.meta[SPEC] = node.meta[SPEC]
            total = graph.call_function(aten.sum.default, (square,))
            dtype = node.meta[SPEC].dtype
            total.meta[SPEC] = TensorSpec((), dtype if dtype.is_floating_point else torch.int64, ())
            sums.append(total)
    graph.output(tuple(sums))
    module.graph = graph
    return Graph(module, ((), {}))


def variants(target: Any, sample: Any) -> Iterator[tuple[Graph, fx.Node]]:
    """Yield a sample call with every choice of which operands vanish, all of them first, and the call's node."""
    leaves = pytree.tree_leaves((sample.args, sample.kwargs), is_leaf=lambda v: isinstance(v, P))
    count = len({id(v) for v in leaves if isinstance(v, P)})
    for vanish in product((True, False), repeat=min(count, 3)):
        graph = build(target, sample, (*vanish, *[True] * (count - len(vanish))))
        (call,) = graph.module.graph.find_nodes(op="call_function", target=target)[:1]
        yield graph, call


def run(graph: Graph, node: fx.Node) -> list[Tensor]:
    """Return the values of a node."""
    seen: list[Any] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            if n is node:
                seen.append(pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, found))
            return found

    with torch.no_grad():
        Watch(graph.module).run()
    return [t for t in pytree.tree_leaves(seen) if isinstance(t, Tensor)]


def assert_zero(typing: Typing, call: fx.Node, keep: dict[Atom, Indices]) -> None:
    """Check that the call's result is zero wherever an index was removed: its sum was called exact."""
    (atom,) = keep
    changed = typing.graph.clone()
    copied = zeroed(changed.module, typing, keep)
    assert isinstance(copied, TraceModule)
    (twin,) = [n for n in copied.graph.nodes if n.name == call.name]
    value = typing.values[call]
    for axes, result in zip(
        [value] if isinstance(value, tuple) else value or [], run(Graph(copied, ((), {})), twin), strict=True
    ):
        assert isinstance(axes, tuple)
        for dim, axis in enumerate(axes):
            index = index_at(axis, atom)
            removed = np.flatnonzero((index >= 0) & ~np.isin(index, keep[atom]))
            if result.dtype.is_floating_point:
                assert not result.index_select(dim, torch.from_numpy(removed)).any(), f"{call.target} is not zero"

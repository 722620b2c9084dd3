"""Build graphs of one operator, without an export, and run them in ONNX Runtime."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.graph import SPEC, Graph, Spec, TensorSpec, TraceModule, set_tensor
from graphopt.targets.lowering.storage import write
from graphopt.targets.lowering.translate import Translated, translate
from graphopt.targets.onnx import runner

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


aten = torch.ops.aten

FIRST_ONLY = frozenset(
    {
        aten._native_batch_norm_legit_no_training.default,
        aten.native_batch_norm.default,
        aten.native_layer_norm.default,
        aten.native_dropout.default,
        aten.max_pool2d_with_indices.default,
        aten.adaptive_max_pool1d.default,
        aten.adaptive_max_pool2d.default,
        aten.adaptive_max_pool3d.default,
    }
)
"""Operators of which only the first result is translated; the others serve training."""


@dataclass(frozen=True, eq=False)
class Weight:
    """Mark a tensor that the graph owns."""

    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Fixed:
    """Mark an input whose first dimension does not vary; that of every other tensor does."""

    tensor: torch.Tensor


def longer(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with two more rows: copies of the first ones."""
    return torch.cat([tensor, tensor[:2]])


def single(target: Any, *args: Any, **kwargs: Any) -> Graph:
    """Return a graph that calls ``target`` on inputs whose first dimension varies, unless marked otherwise."""
    return together([(target, args, kwargs)])[0]


def together(calls: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> tuple[Graph, list[slice]]:
    """Return a graph that makes all these calls, each on inputs of its own, and which outputs are whose."""
    module = TraceModule(nn.Module(), fx.Graph(), "Single")
    graph = fx.Graph()
    inputs: list[torch.Tensor] = []
    outputs: list[fx.Node] = []
    parts: list[slice] = []
    for target, args, kwargs in calls:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [_operand(graph, module, leaf, inputs) for leaf in leaves]
        call_args, call_kwargs = pytree.tree_unflatten(operands, spec)
        call = graph.call_function(target, call_args, call_kwargs)
        small, large = (eager(target, args, kwargs, rows) for rows in (False, True))
        call.meta[SPEC] = described(small, large)
        start = len(outputs)
        if isinstance(small, tuple | list):
            for i, part in enumerate(small):
                if isinstance(part, torch.Tensor) and (i == 0 or target not in FIRST_ONLY):
                    item = graph.call_function(operator.getitem, (call, i))
                    item.meta[SPEC] = call.meta[SPEC][i]
                    outputs.append(item)
        else:
            outputs.append(call)
        parts.append(slice(start, len(outputs)))
    graph.output(tuple(outputs))
    # Inputs stand first in a graph.
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not first:
            first.append(node)
            first = node
    module.graph = graph
    module.eval()
    return Graph(module, (tuple(inputs), {})), parts


def _operand(graph: fx.Graph, module: TraceModule, leaf: Any, inputs: list[torch.Tensor]) -> Any:
    if isinstance(leaf, Weight):
        name = f"weight{len(list(module.parameters()))}"
        set_tensor(module, name, nn.Parameter(leaf.tensor, requires_grad=False))
        node = graph.create_node("get_attr", name)
        node.meta[SPEC] = TensorSpec.of(leaf.tensor)
        return node
    if not isinstance(leaf, torch.Tensor | Fixed):
        return leaf
    tensor = leaf.tensor if isinstance(leaf, Fixed) else leaf
    varies = isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    node = graph.placeholder(f"x{len(inputs)}")
    node.meta[SPEC] = TensorSpec(
        tuple(tensor.shape), tensor.dtype, tuple(varies and d == 0 for d in range(tensor.dim()))
    )
    inputs.append(tensor)
    return node


def call_inputs(graph: Graph, more: bool) -> Inputs:
    """Return the example inputs, with more rows in those whose first dimension varies if so wanted."""
    specs = [node.meta[SPEC] for node in graph.module.graph.find_nodes(op="placeholder")]
    args = graph.example_inputs[0]
    return tuple(longer(x) if more and any(s.dynamic) else x for x, s in zip(args, specs, strict=True)), {}


def eager(target: Any, args: Any, kwargs: Any, more: bool) -> Any:
    """Call the operator itself, with more rows if so wanted."""

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Weight | Fixed):
            return leaf.tensor.clone()
        if isinstance(leaf, torch.Tensor):
            return longer(leaf) if more and leaf.dim() > 0 else leaf.clone()
        return leaf

    args, kwargs = pytree.tree_map(value, (args, kwargs))
    with torch.no_grad():
        return target(*args, **kwargs)


def described(small: Any, large: Any) -> Spec:
    """Return the type of a result from its values for two sizes of the inputs."""
    if isinstance(small, tuple | list):
        return tuple(described(a, b) for a, b in zip(small, large, strict=True))
    if not isinstance(small, torch.Tensor):
        return None
    dynamic = tuple(a != b for a, b in zip(small.shape, large.shape, strict=True))
    return TensorSpec(tuple(small.shape), small.dtype, dynamic)


def lowered(graph: Graph, folder: Path) -> tuple[Translated, Any]:
    """Translate and load a graph; return the translation and the function that runs it."""
    import onnx

    translated = translate(graph)
    path = folder / "single.onnx"
    write(translated.skeleton, translated.weights, path)
    onnx.checker.check_model(str(path), full_check=True)
    return translated, runner(graph, translated, path)


def tensors(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            yield leaf

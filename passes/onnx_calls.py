"""Read calls of the ONNX dialect: what the passes share that look for patterns of its operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from graphopt.dialects.onnx.operators import Op
from graphopt.graph import Graph, TensorSpec, spec_of

__all__ = ["constant", "is_call", "number", "only_reader", "order_of", "shape_of", "tensor_type"]


def is_call(node: Any, *names: str) -> bool:
    """Say whether a value is the call of one of these operators, by their keys; of any operator where none is named."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, Op):
        return False
    return not names or node.target.key in names


def tensor_type(node: Any) -> TensorSpec | None:
    """Return the type of a node that yields one tensor; None for anything else."""
    spec = spec_of(node) if isinstance(node, fx.Node) else None
    return spec if isinstance(spec, TensorSpec) else None


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor none of whose sizes varies; None for anything else."""
    spec = tensor_type(node)
    return None if spec is None or any(spec.dynamic) else spec.shape


def constant(graph: Graph, node: Any, *, parameters: bool = True) -> torch.Tensor | None:
    """Return the values of a tensor of the model; None for what is computed, or has no values in memory.

    Args:
        graph: the graph that ``node`` is of.
        node: what may read the tensor.
        parameters: whether a parameter's values, which training changes, count as known.
    """
    if not isinstance(node, fx.Node) or node.op != "get_attr" or tensor_type(node) is None:
        return None
    tensor = graph.tensor(str(node.target))
    if tensor.is_meta or (isinstance(tensor, nn.Parameter) and not parameters):
        return None
    return tensor.detach()


def number(graph: Graph, node: Any) -> float | None:
    """Return the value of a tensor of the model that has one entry; None for anything else."""
    if isinstance(node, int | float):
        return float(node)
    tensor = constant(graph, node)
    return float(tensor) if tensor is not None and tensor.numel() == 1 and not tensor.is_complex() else None


def only_reader(node: fx.Node, reader: fx.Node | Iterable[fx.Node]) -> bool:
    """Say whether nothing but ``reader`` reads a value."""
    allowed = {reader} if isinstance(reader, fx.Node) else set(reader)
    return set(node.users) <= allowed


def order_of(node: Any) -> tuple[int, ...] | None:
    """Return which dimension of its operand each dimension of a Transpose's result is; None for anything else."""
    if not is_call(node, "Transpose"):
        return None
    spec = tensor_type(node.args[0])
    if spec is None:
        return None
    perm = node.kwargs.get("perm")
    return tuple(perm) if perm is not None else tuple(range(len(spec.shape)))[::-1]

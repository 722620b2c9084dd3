"""Read weights that a file holds as whole numbers.

What may live here: which operands are such weights, and which real numbers they stand for.
"""

from __future__ import annotations

import re
from typing import Final

import torch
from torch import fx

from graphopt.dialects.onnx.operators import Op, op
from graphopt.graph import Call, Graph

__all__ = ["WEIGHTS", "is_quantized", "real_value"]

WEIGHTS: Final[dict[str, tuple[str, str | None, str]]] = {
    "DequantizeLinear": ("x", "x_scale", "x_zero_point"),
    "com.microsoft.DequantizeLinear": ("x", "x_scale", "x_zero_point"),
    "QLinearConv": ("w", "w_scale", "w_zero_point"),
    "QLinearMatMul": ("b", "b_scale", "b_zero_point"),
    "ConvInteger": ("w", None, "w_zero_point"),
    "MatMulInteger": ("B", None, "b_zero_point"),
}
"""Operators that read weights as whole numbers: the operand itself, what it is multiplied with, what stands for zero.

Where that is 0, the numbers are parameters: setting one to zero takes it away.
"""


_QUANTIZED: Final = re.compile("QuantizeLinear|^QLinear|^QGemm|Integer")


def is_quantized(graph: Graph) -> bool:
    """Say whether a graph computes with whole numbers that stand for real ones."""
    return any(isinstance(node.target, Op) and _QUANTIZED.search(node.target.name) for node in graph.nodes)


def real_value(graph: Graph, name: str) -> torch.Tensor:
    """Return the real numbers for which the whole numbers of a tensor stand, as its first reader sees them.

    A scale that is computed at run time is left out: it is the same for all of the tensor.
    """
    tensor = graph.value(name)
    for node in graph.module.graph.find_nodes(op="get_attr", target=name):
        for reader in node.users:
            places = WEIGHTS.get(reader.target.key) if isinstance(reader.target, Op) else None
            if places is None or Call(reader)[places[0]] is not node:
                continue
            found = _dequantized(graph, reader, tensor, places)
            if found is not None:
                return found
    return tensor.detach().float()


def _dequantized(
    graph: Graph, reader: fx.Node, tensor: torch.Tensor, places: tuple[str, str | None, str]
) -> torch.Tensor | None:
    call = Call(reader)
    scale = call[places[1]] if places[1] is not None else None
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return None
    numbers = graph.tensor(str(scale.target)).detach()
    axis = call["axis"] if call.has("axis") else 0  # of a convolution's weight, the outputs come first
    extra = {"block_size": call["block_size"]} if call.has("block_size") else {}
    if places[0] == "b" and numbers.dim():
        return None  # of a product's weight, the outputs come last, and stacks of matrices before
    found: torch.Tensor = op("DequantizeLinear")(tensor.detach(), numbers, None, axis=axis, **extra)
    return found

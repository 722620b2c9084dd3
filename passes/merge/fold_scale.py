"""Fold a scale or a shift by constants into the layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from graphopt.dialects.layers import read_layer
from graphopt.dialects.onnx.operators import Op
from graphopt.dialects.products import operator_key
from graphopt.editing import remove_dead, replace
from graphopt.graph import Call, Graph, TensorSpec, spec_of
from graphopt.passes.merge.scaling import Layer, Map, Refusal, constant, find_layer
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register

aten = torch.ops.aten

OPERATORS: Final[dict[Any, str]] = {
    **{aten_op.Tensor: "mul" for aten_op in (aten.mul, aten.mul_)},
    **{aten_op.Tensor: "div" for aten_op in (aten.div, aten.div_)},
    **{aten_op.Tensor: "add" for aten_op in (aten.add, aten.add_)},
    **{aten_op.Tensor: "sub" for aten_op in (aten.sub, aten.sub_)},
    **{name: name.lower() for name in ("Mul", "Div", "Add", "Sub")},
}
"""What each operator does with its two operands."""


@register
@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold a product or a sum with one number a channel into the linear layer or convolution before it.

    With g and c of one number an output channel (or one for all), g (W x + b) + c = (g W) x + (g b + c): layer scale
    (CaiT, ConvNeXt), learned shifts, constant factors. Between the layer and the product may be permutations and
    reshapes that leave the channels whole. Exact up to rounding; computed in float64.

    The factor is gone in training as well; ``trainable`` keeps those that are parameters.

    Left as they are: layers whose result is read by others, parameters that are shared, and numbers along another
    dimension than the layer's channels.

    Args:
        trainable: leave factors and shifts that are parameters, and fold only buffers and numbers.

    Source: layer scale is that of Touvron et al. 2021, arXiv:2103.17239, section 2.
    """

    name: ClassVar[str] = "fold-scale"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    trainable: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in list(graph.nodes):
            kind = OPERATORS.get(operator_key(node)) if node.op == "call_function" else None
            if kind is None or read_layer(node) is not None:  # the sum of a product and its bias is no site
                continue
            found = _read(graph, node, kind)
            if found is None:
                continue
            value, channel, given = found
            layer = find_layer(graph, value, channel)
            if isinstance(layer, Layer) and given.shift is not None and not layer.takes_bias:
                continue  # it would be a sum after the layer again
            if isinstance(layer, Refusal):
                if layer.is_site:
                    context.skipped(node.name, layer.reason)
                continue
            names = list(given.tensors)
            if self.trainable and any(isinstance(graph.tensor(name), nn.Parameter) for name in names):
                context.skipped(node.name, f"{names[0]} is trained by itself (trainable=false folds it)")
                continue
            if not context.allows(node.name):
                continue
            layer.map_outputs(graph, given)
            replace(node, value)
            graph.module.graph.erase_node(node)
            what = f"{names[0] if names else 'a number'} into {layer.weight.target}"
            context.applied(node.name, what, operator=str(node.target))
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


def _read(graph: Graph, node: fx.Node, kind: str) -> tuple[fx.Node, int | None, Map] | None:
    """Return what a call scales or shifts, along which dimension, and the map; None if by something that varies."""
    call = Call(node)
    out = spec_of(node)
    if not isinstance(out, TensorSpec) or not out.dtype.is_floating_point or _has_options(call):
        return None
    first, second = node.args[0], call["B" if isinstance(node.target, Op) else "other"]
    for value, other in ((first, second), (second, first)):
        if not isinstance(value, fx.Node) or spec_of(value) != out:
            continue
        read = constant(graph, other, out)
        if read is None:
            continue
        numbers, channel, name, dim = read
        if value is not first and kind in ("div", "sub"):
            return None
        tensors = {} if name is None else {name: dim}
        return value, channel, _map(kind, numbers, tensors)
    return None


def _has_options(call: Call) -> bool:
    return call.has("alpha") and call["alpha"] != 1


def _map(kind: str, numbers: torch.Tensor, tensors: dict[str, int | None]) -> Map:
    if kind == "mul":
        return Map(scale=numbers, tensors=tensors)
    if kind == "div":
        return Map(scale=1 / numbers, tensors=tensors)
    return Map(shift=numbers if kind == "add" else -numbers, tensors=tensors)

"""Fold inference batch normalisation into a neighbouring layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.dialects.layers import norm_of
from graphopt.editing import find_tensor, remove_dead, remove_tensor, replace
from graphopt.graph import OWNER, Graph, tensor_spec
from graphopt.passes.merge.scaling import Layer, Map, Refusal, find_layer, layer_of, value_readers
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural


@register
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold inference batch normalisation into the convolution or linear layer before it, or those after it.

    A batch norm is y = s x + t for each channel, s = weight / sqrt(running_var + eps), t = bias - s running_mean. The
    layer before it, W x + b, becomes (s W) x + (s b + t). Where there is no such layer, those that read it become
    (W s) x + (b + W t); at zero padding that is exact only for t = 0, and refused otherwise. Layers get a bias where
    they had none. Exact up to rounding; s and t are computed in float64.

    The batch norm is gone in training as well: what is trained afterwards is not normalised by its batches any more.

    Left as they are: batch norms that normalise by their batches in evaluation too, layers whose result is read by
    others, and parameters that are shared.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    name: ClassVar[str] = "fold-batch-norm"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        norms = [node for node in graph.nodes if norm_of(node) is not None]
        counters: set[str] = set()
        refused: dict[fx.Node, Refusal] = {}
        # Into the layer before, first to last; what is left into the layers after, last to first: so that of several
        # batch norms in a row each meets the layer.
        for node in norms:
            found = _map_of(graph, node)
            layer = found if isinstance(found, Refusal) else find_layer(graph, _input(node), 1)
            if isinstance(layer, Refusal):
                refused[node] = layer
            elif context.allows(node.name):
                assert isinstance(found, Map)
                layer.map_outputs(graph, found)
                counters.add(_take_out(graph, node, [layer], "before", context))
        for node, before in reversed(refused.items()):
            found = _map_of(graph, node)
            layers = before if isinstance(found, Refusal) else _layers_after(graph, node, before, found)
            if isinstance(layers, Refusal):
                context.skipped(node.name, layers.reason, module=_module(node))
            elif context.allows(node.name):
                assert isinstance(found, Map)
                for each in layers:
                    each.map_inputs(graph, found)
                counters.add(_take_out(graph, node, layers, "after", context))
        removed = remove_dead(graph)
        _forget(graph, counters, removed.tensors)
        graph.module.recompile()
        return PassResult(graph)


def _module(node: fx.Node) -> str:
    return str(node.meta.get(OWNER, ""))


def _take_out(graph: Graph, node: fx.Node, layers: list[Layer], where: str, context: Context) -> str:
    """Take out a batch norm that was folded; return the name of its batch counter."""
    names = ", ".join(str(layer.weight.target) for layer in layers)
    context.applied(node.name, f"into {names}, {where} it", module=_module(node))
    norm = norm_of(node)
    assert norm is not None
    path = str(norm.statistics["running_mean"].target).rpartition(".")[0]
    replace(node, norm.input)
    graph.module.graph.erase_node(node)
    return f"{path}.num_batches_tracked".removeprefix(".")


def _input(node: fx.Node) -> fx.Node:
    norm = norm_of(node)
    assert norm is not None
    return norm.input


def _map_of(graph: Graph, node: fx.Node) -> Map | Refusal:
    """Read scale and shift of a batch norm off its tensors."""
    norm = norm_of(node)
    assert norm is not None
    if norm.training:
        return Refusal("it normalises by its batches in evaluation, too")
    given = norm.statistics
    if "running_mean" not in given or "running_var" not in given:
        return Refusal("it has no running statistics")
    for name, operand in given.items():
        if operand.op != "get_attr":
            return Refusal(f"its {name} is computed by {operand.name}, not a tensor of the model")
    if tensor_spec(norm.input) != tensor_spec(node):
        return Refusal(f"it turns {tensor_spec(norm.input)} into {tensor_spec(node)}")
    values = {name: graph.tensor(str(operand.target)).detach().double() for name, operand in given.items()}
    scale = (values["running_var"] + norm.eps).rsqrt()
    if "weight" in values:
        scale = scale * values["weight"]
    shift = -scale * values["running_mean"]
    if "bias" in values:
        shift = shift + values["bias"]
    return Map(scale, shift, {str(operand.target): 0 for operand in given.values()})


def _layers_after(graph: Graph, node: fx.Node, before: Refusal, given: Map) -> list[Layer] | Refusal:
    """Return the layers that read a batch norm, if they are all that does and can take its map."""
    found = [_reading(graph, reader, node, given) for reader in value_readers(node)]
    refusals = [each.reason for each in found if isinstance(each, Refusal)]
    if refusals or not found:
        reason = refusals[0] if refusals else "nothing reads it"
        others = f" (and {plural(len(refusals) - 1, 'more reader')})" if len(refusals) > 1 else ""
        return Refusal(f"not before: {before.reason}; not after: {reason}{others}")
    return [each for each in found if isinstance(each, Layer)]


def _reading(graph: Graph, reader: fx.Node, node: fx.Node, given: Map) -> Layer | Refusal:
    """Return a layer that reads a batch norm, if it can take its map exactly."""
    layer = layer_of(graph, reader)
    if isinstance(layer, Refusal):
        return layer
    assert given.shift is not None
    affine = layer.affine
    if affine.input is not node or layer.channel != 1:
        return Refusal(f"{reader.name} reads the channels, dimension 1, as something else")
    if affine.transposed or (affine.groups > 1 and affine.shape[1] != 1):
        return Refusal(f"{reader.name} is transposed, or has groups of several channels")
    if not layer.takes_bias and bool(given.shift.any()):
        return Refusal(f"{reader.name} has no bias that could take the shift: one more sum would be left")
    if affine.groups > 1 and affine.out_channels != affine.groups:
        return Refusal(f"{reader.name} makes several outputs of each channel")
    if not layer.is_unpadded and bool(given.shift.any()):
        largest = float(given.shift.abs().max())
        return Refusal(f"{reader.name} pads with zeros, where the shift (up to {largest:.3g}) would be missing")
    return layer


def _forget(graph: Graph, counters: set[str], removed: tuple[str, ...]) -> None:
    """Drop the batch counters of batch norms that are gone; no node ever read them."""
    paths = {name.rpartition(".")[0] for name in removed if name.endswith("running_mean")}
    for name in sorted(counters):
        if name.rpartition(".")[0] in paths and find_tensor(graph, name) is not None:
            remove_tensor(graph, name)
            graph.module.meta.get("counters", {}).pop(name, None)

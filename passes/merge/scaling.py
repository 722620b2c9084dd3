"""Scale and shift the channels that a linear layer or a convolution yields or reads, by changing its parameters.

What may live here: what the passes share that fold a per-channel map into a layer: finding the layer, reading the map
off the graph, and making the layer's new weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphopt.dialects.layers import Affine, layer_with, read_layer
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read, readers, replace, replace_tensor
from graphopt.graph import Call, Graph, Source, Sources, TensorSpec, spec_of, tensor_spec
from graphopt.passes.affine import made_of, unavailable
from graphopt.passes.shapes import is_expansion, is_reshape, permutation
from graphopt.report.wording import listing, plural

__all__ = ["Layer", "Map", "Refusal", "constant", "find_layer", "layer_of", "value_readers"]

aten = torch.ops.aten

_SHAPE_ONLY: Final = frozenset(
    {
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
        aten.full_like.default,
    }
)
_SHAPE_OF_OTHER: Final = frozenset({aten.reshape_as.default, aten.view_as.default, aten.expand_as.default})


@dataclass(frozen=True)
class Refusal:
    """Say why a layer cannot take a map; ``is_site`` where there is a layer that could have, but for this."""

    reason: str
    is_site: bool = True


@dataclass(frozen=True)
class Map:
    """A map of channels, ``y_c = scale_c x_c + shift_c``, in float64; ``tensors`` are those it is made of.

    ``dims`` says which dimension of each of them the channels are; None for a tensor of one entry.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    tensors: dict[str, int | None] = field(default_factory=dict)

    def sources(self, graph: Graph) -> tuple[Source, ...]:
        """Return what the channels stand for in the input model."""
        places = [(name, dim) for name, dim in self.tensors.items() if dim is not None]
        return tuple(source for name, dim in places for source in graph.stands_for(name, dim))


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution whose parameters are its own."""

    affine: Affine

    @property
    def node(self) -> fx.Node:
        """The node that yields its result."""
        return self.affine.node

    @property
    def weight(self) -> fx.Node:
        """The node of its weight."""
        return self.affine.weight

    @property
    def takes_bias(self) -> bool:
        """Say whether it has a bias, or an argument for one."""
        return self.affine.bias is not None or self.affine.slot is not None

    @property
    def channel(self) -> int:
        """The dimension of input and result that holds the channels."""
        return len(self.affine.out.shape) + self.affine.channel

    @property
    def is_unpadded(self) -> bool:
        """Say whether every output sees whole kernels of inputs, and none of zeros around them."""
        return not is_padded(self.affine)

    def map_outputs(self, graph: Graph, given: Map) -> None:
        """Let the layer yield ``scale * y + shift``: weight ``w * scale`` by output, bias ``b * scale + shift``."""
        layer, sources = self.affine, given.sources(graph)
        weight = graph.tensor(str(layer.weight.target))
        shift = None if given.shift is None else given.shift / layer.bias_scale
        if given.scale is not None:
            value = weight.detach().double() * self._by_output(given.scale)
            # With groups, a transposed convolution's outputs are no dimension of its weight.
            dim = None if layer.transposed and layer.groups > 1 else layer.rows
            self._set(graph, layer.weight, made_of([weight], value), dim, sources)
        if layer.bias is not None:
            bias = graph.tensor(str(layer.bias.target)).detach().double()
            bias = bias if given.scale is None else bias * given.scale
            self._set_bias(graph, bias if shift is None else bias + shift, sources)
        elif shift is not None and bool(shift.any()):
            self._add_bias(graph, shift.expand(layer.out_channels), sources)

    def map_inputs(self, graph: Graph, given: Map) -> None:
        """Let the layer read x where it read ``scale * x + shift``: weight ``w * scale``, bias ``b + w shift``."""
        layer, sources = self.affine, given.sources(graph)
        weight = graph.tensor(str(layer.weight.target))
        old = weight.detach().double()
        depthwise = layer.groups > 1
        dim = layer.rows if depthwise else layer.columns
        spread = [-1 if d == dim else 1 for d in range(old.dim())]
        if given.shift is not None and bool(given.shift.any()):
            added = (old * given.shift.view(spread)).sum([d for d in range(old.dim()) if d != layer.rows])
            added = added * layer.scale / layer.bias_scale
            if layer.bias is None:
                self._add_bias(graph, added, graph.stands_for(str(layer.weight.target), layer.rows))
            else:
                self._set_bias(graph, graph.tensor(str(layer.bias.target)).detach().double() + added, ())
        if given.scale is not None:
            self._set(graph, layer.weight, made_of([weight], old * given.scale.view(spread)), dim, sources)

    def _by_output(self, scale: Tensor) -> Tensor:
        """Spread one number an output channel (or one for all) over the weight."""
        if scale.numel() == 1:
            return scale.reshape(())
        shape = tensor_spec(self.weight).shape
        if not self.affine.transposed:
            return scale.view([-1 if d == self.affine.rows else 1 for d in range(len(shape))])
        rows = scale.view(self.affine.groups, 1, shape[1]).expand(-1, shape[0] // self.affine.groups, -1)
        return rows.reshape(*shape[:2], *(1,) * (len(shape) - 2))

    def _set(self, graph: Graph, node: fx.Node, tensor: Tensor, dim: int | None, more: Sequence[Source]) -> None:
        name = str(node.target)
        known = {each: graph.stands_for(name, each) for each in range(tensor.dim())}
        if dim is not None:
            known[dim] = (*known[dim], *more)
        replace_tensor(graph, name, tensor, sources=known)

    def _set_bias(self, graph: Graph, value: Tensor, more: Sequence[Source]) -> None:
        """Put another bias in place; where others read the old one, too, as a tensor of its own."""
        replace_bias(graph, self.affine, value, more)

    def _add_bias(self, graph: Graph, value: Tensor, sources: Sequence[Source]) -> None:
        add_bias(graph, self.affine, value, sources)


def is_padded(layer: Affine) -> bool:
    """Say whether some output of a layer may see zeros around its input, or fewer inputs than others."""
    if layer.is_linear:
        return False
    if layer.padding is None:
        return True
    return any(entry != 0 for pair in layer.padding for entry in pair)


def replace_bias(graph: Graph, layer: Affine, value: Tensor, more: Sequence[Source] = ()) -> None:
    """Put ``value`` in place of a layer's bias, as it is held; where others read that, too, as a tensor of its own."""
    assert layer.bias is not None
    name = str(layer.bias.target)
    old, weight = graph.tensor(name), graph.tensor(str(layer.weight.target))
    tensor = made_of([old] if old.numel() == value.numel() else [old, weight], value)
    last = tensor.dim() - 1
    sources: Sources = {dim: graph.stands_for(name, dim) for dim in range(min(old.dim(), tensor.dim()))}
    if last >= 0:
        sources[last] = (*(sources.get(last, ()) if old.numel() == value.numel() else ()), *more)
    if len(graph.names(name)) == 1 and len(readers(graph, name)) == 1:
        replace_tensor(graph, name, tensor, sources=sources)
        return
    reader = layer.node if layer.slot is None else layer.product
    reader.replace_input_with(layer.bias, read(graph, add_tensor(graph, name, tensor, sources=sources), reader))


def add_bias(graph: Graph, layer: Affine, value: Tensor, sources: Sequence[Source]) -> None:
    """Give a layer that has none a bias, as it is held: as its argument, or as a sum after it."""
    weight = graph.tensor(str(layer.weight.target))
    path = str(layer.weight.target).rpartition(".")[0]
    stem = f"{path}.bias" if path else f"{layer.weight.target}_bias" if is_onnx(graph) else "bias"
    name = add_tensor(graph, stem, made_of([weight], value), sources={0: tuple(sources)})
    if layer.slot is not None:
        Call(layer.product)[layer.slot] = read(graph, name, layer.product)
        return
    after = layer.product.next
    total = insert(graph, after, op("Add"), (layer.product, read(graph, name, after)), like=layer.product)
    replace(layer.product, total)


def layer_of(graph: Graph, node: fx.Node) -> Layer | Refusal:
    """Return the layer that ``node`` calls the product of, if its parameters are its own to change."""
    return _own(graph, node, layer_with(node))


def _own(graph: Graph, node: fx.Node, layer: Affine | None) -> Layer | Refusal:
    if layer is None:
        return Refusal(f"{node.name} ({node.target}) is no linear layer or convolution", is_site=False)
    reason = unavailable(graph, (layer.weight, layer.bias))
    return Layer(layer) if reason is None else Refusal(reason)


def value_readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the value of ``node``, and not only its shape."""

    def is_shape_only(user: fx.Node) -> bool:
        return user.target in _SHAPE_ONLY or (user.target in _SHAPE_OF_OTHER and user.args[0] is not node)

    return [user for user in node.users if not is_shape_only(user)]


def find_layer(graph: Graph, value: fx.Node, channel: int | None) -> Layer | Refusal:
    """Return the layer that alone makes ``value``, whose dimension ``channel`` holds the layer's output channels.

    Where ``channel`` is None, all of the layer's results are mapped alike, and they may stand anywhere.

    In between may be permutations and reshapes that leave the channels whole; each must have one reader, for all
    readers of a layer would see its channels scaled.
    """
    found: list[Refusal] = []
    while True:
        count = len(readers := value_readers(value))
        if count > 1:
            names = listing([reader.name for reader in readers])
            found.append(Refusal(f"{value.name} has {plural(count, 'reader')} ({names})"))
        if (affine := read_layer(value)) is not None:
            layer = _own(graph, value, affine)
            if found or isinstance(layer, Refusal):
                return found[0] if found else layer
            if channel in (None, layer.channel):
                return layer
            return Refusal(
                f"dimension {channel} of {value.name} is mapped, whose channels are in dimension {layer.channel}"
            )
        before = _channel_before(value, channel)
        if before is None:
            return Refusal(f"{value.name} ({value.target}) comes before it, no linear layer or convolution", False)
        value, channel = before


def _channel_before(node: fx.Node, channel: int | None) -> tuple[fx.Node, int | None] | None:
    """Return what a call rearranges, and which of its dimensions is ``channel`` of the result."""
    order = permutation(node)
    if order is not None:
        return node.args[0], None if channel is None else order[channel]  # type: ignore[return-value]
    if not is_reshape(node) or not isinstance(x := node.args[0], fx.Node):
        return None
    if channel is None:
        return x, None
    old, new = tensor_spec(x), tensor_spec(node)
    if any(new.dynamic[channel:]):
        return None
    inner = prod(new.shape[channel + 1 :])
    for dim, size in enumerate(old.shape):
        if any(old.dynamic[dim:]) or size != new.shape[channel]:
            continue
        if prod(old.shape[dim + 1 :]) == inner and (size > 1 or len(old.shape) - dim == len(new.shape) - channel):
            return x, dim
    return None


def constant(graph: Graph, operand: Any, out: TensorSpec) -> tuple[Tensor, int | None, str | None, int | None] | None:
    """Read an operand that is a number, or one number a channel.

    Returns:
        The numbers in float64, the dimension of ``out`` that they belong to, the tensor's name and which dimension of
        it they are; None if the operand is something else.
    """
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return torch.tensor(float(operand), dtype=torch.float64), None, None, None
    chain = []
    while isinstance(operand, fx.Node) and operand.op == "call_function":
        if not (is_reshape(operand) or permutation(operand) is not None or is_expansion(operand)):
            return None
        if len(operand.all_input_nodes) > 1:
            return None
        chain.append(operand)
        operand = operand.args[0]
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    spec = spec_of(chain[0] if chain else operand)
    if not isinstance(spec, TensorSpec) or len(spec.shape) > len(out.shape) or not spec.dtype.is_floating_point:
        return None
    name = str(operand.target)
    wide = [dim for dim, size in enumerate(spec.shape) if size > 1]
    tensor = graph.tensor(name)
    own = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    value = tensor.detach().double().reshape(-1)
    if not wide and not own:
        return value.reshape(()), None, name, None
    if len(wide) != 1 or len(own) != 1:
        return None
    channel = wide[0] + len(out.shape) - len(spec.shape)
    return (value, channel, name, own[0]) if out.shape[channel] == value.numel() else None

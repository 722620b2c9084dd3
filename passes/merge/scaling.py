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

from graphopt.editing import add_tensor, read, replace_tensor
from graphopt.graph import Call, Graph, Source, TensorSpec, spec_of, tensor_spec
from graphopt.passes.affine import made_of, unavailable
from graphopt.passes.canonicalize.identities import RESHAPING, permutation
from graphopt.report.wording import listing, plural

__all__ = ["Layer", "Map", "Refusal", "constant", "find_layer", "layer_of", "value_readers"]

aten = torch.ops.aten

LAYERS: Final[dict[Any, bool]] = {
    aten.linear.default: False,
    aten.conv1d.default: False,
    aten.conv1d.padding: False,
    aten.conv2d.default: False,
    aten.conv2d.padding: False,
    aten.conv3d.default: False,
    aten.conv3d.padding: False,
    aten.conv_transpose1d.default: True,
    aten.conv_transpose2d.input: True,
    aten.conv_transpose3d.input: True,
}
"""Layers with a weight and perhaps a bias, and whether the weight has its inputs before its outputs."""

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

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    groups: int

    @property
    def out(self) -> int:
        """The number of output channels."""
        rows = tensor_spec(self.weight).shape[1 if self.transposed else 0]
        return rows * self.groups if self.transposed else rows

    @property
    def channel(self) -> int:
        """The dimension of input and result that holds the channels."""
        rank = len(tensor_spec(self.node).shape)
        return rank - 1 - (len(tensor_spec(self.weight).shape) - 2)

    @property
    def is_unpadded(self) -> bool:
        """Say whether every output sees whole kernels of inputs, and none of zeros around them."""
        if self.node.target is aten.linear.default:
            return True
        padding = Call(self.node)["padding"]
        if isinstance(padding, str):
            return padding == "valid" or prod(tensor_spec(self.weight).shape[2:]) == 1
        return not self.transposed and all(entry == 0 for entry in padding)

    def map_outputs(self, graph: Graph, given: Map) -> None:
        """Let the layer yield ``scale * y + shift``: weight ``w * scale`` by output, bias ``b * scale + shift``."""
        weight, sources = graph.tensor(str(self.weight.target)), given.sources(graph)
        shift = given.shift
        if given.scale is not None:
            value = weight.detach().double() * self._by_output(given.scale)
            # With groups, a transposed convolution's outputs are no dimension of its weight.
            dim = (1 if self.groups == 1 else None) if self.transposed else 0
            self._set(graph, self.weight, made_of([weight], value), dim, sources)
        if self.bias is not None:
            bias = graph.tensor(str(self.bias.target))
            value = bias.detach().double()
            value = value if given.scale is None else value * given.scale
            self._set(graph, self.bias, made_of([bias], value if shift is None else value + shift), 0, sources)
        elif shift is not None and bool(shift.any()):
            self._add_bias(graph, shift.expand(self.out), sources)

    def map_inputs(self, graph: Graph, given: Map) -> None:
        """Let the layer read x where it read ``scale * x + shift``: weight ``w * scale``, bias ``b + w shift``."""
        weight, sources = graph.tensor(str(self.weight.target)), given.sources(graph)
        old = weight.detach().double()
        depthwise = self.groups > 1
        shape = (-1, 1) if depthwise else (1, -1)
        spread = shape + (1,) * (old.dim() - 2)
        if given.shift is not None and bool(given.shift.any()):
            added = (old * given.shift.view(spread)).sum(tuple(range(1, old.dim())))
            if self.bias is None:
                self._add_bias(graph, added, graph.stands_for(str(self.weight.target), 0))
            else:
                bias = graph.tensor(str(self.bias.target))
                self._set(graph, self.bias, made_of([bias], bias.detach().double() + added), 0, ())
        if given.scale is not None:
            dim = 0 if depthwise else 1
            self._set(graph, self.weight, made_of([weight], old * given.scale.view(spread)), dim, sources)

    def _by_output(self, scale: Tensor) -> Tensor:
        """Spread one number an output channel (or one for all) over the weight."""
        if scale.numel() == 1:
            return scale.reshape(())
        shape = tensor_spec(self.weight).shape
        if not self.transposed:
            return scale.view(-1, *(1,) * (len(shape) - 1))
        rows = scale.view(self.groups, 1, shape[1]).expand(-1, shape[0] // self.groups, -1)
        return rows.reshape(*shape[:2], *(1,) * (len(shape) - 2))

    def _set(self, graph: Graph, node: fx.Node, tensor: Tensor, dim: int | None, more: Sequence[Source]) -> None:
        name = str(node.target)
        known = {each: graph.stands_for(name, each) for each in range(tensor.dim())}
        if dim is not None:
            known[dim] = (*known[dim], *more)
        replace_tensor(graph, name, tensor, sources=known)

    def _add_bias(self, graph: Graph, value: Tensor, sources: Sequence[Source]) -> None:
        weight = graph.tensor(str(self.weight.target))
        path = str(self.weight.target).rpartition(".")[0]
        stem = f"{path}.bias" if path else "bias"
        name = add_tensor(graph, stem, made_of([weight], value), sources={0: tuple(sources)})
        Call(self.node)["bias"] = read(graph, name, self.node)


def layer_of(graph: Graph, node: fx.Node) -> Layer | Refusal:
    """Return the layer that ``node`` calls, if its parameters are its own to change."""
    if node.target not in LAYERS:
        return Refusal(f"{node.name} ({node.target}) is no linear layer or convolution", is_site=False)
    call = Call(node)
    weight, bias = call["weight"], call["bias"]
    reason = unavailable(graph, (weight, bias))
    if reason is not None:
        return Refusal(reason)
    groups = call["groups"] if call.has("groups") else 1
    return Layer(node, weight, bias, LAYERS[node.target], groups)


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
        if value.target in LAYERS:
            layer = layer_of(graph, value)
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
    if node.target not in RESHAPING or not isinstance(x := node.args[0], fx.Node):
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
        if (
            operand.target not in RESHAPING
            and permutation(operand) is None
            and operand.target is not aten.expand.default
        ):
            return None
        if any(isinstance(each, fx.Node) for each in operand.args[1:]):
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

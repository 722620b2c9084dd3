"""Read linear layers and convolutions as affine maps of one input, the same in every dialect.

What may live here: where a layer's input, weight and bias are, which dimension of its weight is what, and how it goes
over places. What is merged, split or folded there is for others to say.

A linear layer of ONNX is a Gemm, or a MatMul by a tensor of the model, whose weight is ``(in, out)``; the Add of a
vector that alone reads such a MatMul is its bias, and belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphopt.dialects.products import Pairs, Product, operator_key, product_of
from graphopt.graph import Call, Graph, Source, TensorSpec, spec_of, tensor_spec

__all__ = [
    "LAYERS",
    "Affine",
    "Geometry",
    "Norm",
    "is_layer",
    "layer_with",
    "norm_of",
    "read_affine",
    "read_layer",
    "read_product",
]

aten = torch.ops.aten

CONVOLUTIONS: Final[dict[Any, int]] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
"""Convolutions of ATen with numbers for their padding, with the number of their spatial dimensions."""

LAYERS: Final = frozenset(
    {
        aten.linear.default,
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
    }
)
"""Keys of the operators that layers with a weight, and perhaps a bias, are made of."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution goes over its input, without its weights; a linear layer has no spatial dimension.

    ``shape`` is the weight's, ``(out, in / groups, *kernel)``; ``padding`` has the zeros before and after.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: Pairs = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def macs(self, out: TensorSpec) -> int:
        """Multiply-adds, for the batch of the example."""
        return prod(out.shape) * prod(self.shape[1:])


@dataclass(frozen=True)
class Affine:
    """One linear layer or convolution, ``y = scale W x + bias_scale b``.

    A linear layer is a convolution without spatial dimensions. In the common form its weight is ``(out, in)``, that of
    a convolution ``(out, in / groups, *kernel)``, of a transposed one ``(in, out / groups, *kernel)``; a linear layer
    that is ``turned`` holds it as ``(in, out)``. ``stride``, ``padding`` and ``dilation`` have an entry a spatial
    dimension.

    Attributes:
        node: the node that yields the result.
        product: the call that multiplies; another than ``node`` where that adds the bias.
        input: the node it reads.
        weight: the node of the weight.
        bias: the node of the bias, one number or one an output; None without one.
        stride: the steps.
        padding: zeros before and after; None where they follow from the input's size.
        dilation: how far the taps are apart.
        groups: the number of groups.
        transposed: whether it is a transposed convolution.
        turned: whether a linear layer's weight is held as ``(in, out)``.
        scale: what the product is multiplied by.
        bias_scale: what the bias is multiplied by.
    """

    node: fx.Node
    product: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: Pairs | None = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    turned: bool = False
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    def is_linear(self) -> bool:
        """Say whether it is a linear layer."""
        return not self.stride

    @property
    def slot(self) -> str | None:
        """The argument of the product that holds the bias; None where a sum after it does."""
        return _SLOTS.get(operator_key(self.product), "bias")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape in the common form."""
        shape = tensor_spec(self.weight).shape
        return shape[::-1] if self.turned else shape

    @property
    def rows(self) -> int:
        """The dimension of the weight, as it is held, that holds the outputs (of one group, if transposed)."""
        return 1 if self.transposed or self.turned else 0

    @property
    def columns(self) -> int:
        """The dimension of the weight, as it is held, that holds the inputs (of one group, unless transposed)."""
        return 1 - self.rows

    @property
    def out_channels(self) -> int:
        """The number of outputs."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The extents of the kernel."""
        return self.shape[2:]

    @property
    def out(self) -> TensorSpec:
        """What it yields."""
        return tensor_spec(self.node)

    @property
    def channel(self) -> int:
        """The dimension of input and result that holds the channels, counted from the end."""
        return -1 - len(self.kernel)

    @property
    def geometry(self) -> Geometry:
        """How it goes over its input."""
        assert self.padding is not None
        return Geometry(self.shape, self.stride, self.padding, self.dilation, self.groups)

    @property
    def macs(self) -> int:
        """Multiply-adds, for the batch of the example."""
        return self.geometry.macs(self.out)

    @property
    def params(self) -> int:
        """Entries of weight and bias."""
        return prod(self.shape) + (0 if self.bias is None else prod(tensor_spec(self.bias).shape))

    def common(self, weight: Tensor) -> Tensor:
        """Return a weight in the common form, of what it is held as."""
        value = weight.detach()
        value = value.t() if self.turned else value
        return value if self.scale == 1 else value * self.scale

    def held(self, weight: Tensor) -> Tensor:
        """Return a weight as it is held, of its common form."""
        value = weight if self.scale == 1 else weight / self.scale
        return value.t() if self.turned else value

    def kernel_values(self, graph: Graph) -> Tensor:
        """Return the weight in the common form, in float64; it must be a tensor of the model."""
        return self.common(graph.tensor(str(self.weight.target)).detach().double())

    def bias_values(self, graph: Graph) -> Tensor | None:
        """Return what is added to each output, in float64; the bias must be a tensor of the model."""
        if self.bias is None:
            return None
        value = graph.tensor(str(self.bias.target)).detach().double().reshape(-1)
        return value.expand(self.out_channels) * self.bias_scale

    def bias_sources(self, graph: Graph) -> tuple[Source, ...]:
        """Return what the entries of the bias stand for in the input model; one number for all stands for nothing."""
        if self.bias is None or prod(tensor_spec(self.bias).shape) != self.out_channels:
            return ()
        return graph.stands_for(str(self.bias.target), self.bias_dim) if tensor_spec(self.bias).shape else ()

    @property
    def bias_dim(self) -> int:
        """The dimension of the bias that holds the outputs."""
        return max(len(tensor_spec(self.bias).shape) - 1, 0)


_SLOTS: Final[dict[Any, str | None]] = {"Conv": "B", "ConvTranspose": "B", "Gemm": "C", "MatMul": None}


def is_layer(node: fx.Node) -> bool:
    """Say whether a node calls an operator that layers are made of; :func:`layer_with` says of which."""
    return node.op == "call_function" and operator_key(node) in LAYERS


def read_layer(node: fx.Node) -> Affine | None:
    """Return the layer whose result ``node`` is; None for anything else, and for a part of a layer."""
    if node.op != "call_function":
        return None
    key = operator_key(node)
    if key == "Add":
        return _summed(node)
    if key not in LAYERS:
        return None
    if key == "MatMul" and len(node.users) == 1 and _summed(next(iter(node.users))) is not None:
        return None
    return _layer(node)


def layer_with(call: fx.Node) -> Affine | None:
    """Return the layer that ``call`` computes the product of."""
    found = read_layer(call)
    if found is None and operator_key(call) == "MatMul" and len(call.users) == 1:
        found = _summed(next(iter(call.users)))
    return found if found is not None and found.product is call else None


def read_product(call: fx.Node) -> Affine | None:
    """Return the layer that ``call`` is by itself, without a bias that a sum after it adds."""
    return _layer(call) if is_layer(call) else None


def read_affine(node: fx.Node) -> Affine | None:
    """Return the linear layer or convolution whose result ``node`` is, if its geometry is all numbers."""
    layer = read_layer(node)
    if layer is None or layer.transposed or layer.padding is None:
        return None
    is_named = isinstance(layer.product.target, torch._ops.OpOverload) and Call(layer.product).has("padding")
    return layer if not is_named or layer.product.target in CONVOLUTIONS else None


def _layer(node: fx.Node) -> Affine | None:
    found = product_of(node)
    if found is None or found.then is not None or not isinstance(found.left, fx.Node):
        return None
    if found.windows is None:
        return _linear(found)
    windows = found.windows
    places = tensor_spec(found.left)
    first = len(places.shape) - len(windows.kernel)
    padding = windows.padding
    is_fixed = not any(places.dynamic[first:]) or all(step == 1 for step in windows.stride)
    if padding is None and not windows.transposed and is_fixed:
        padding = windows.pads(places.shape[first:])
    if windows.transposed:
        padding = None
    return Affine(
        node,
        node,
        found.left,
        found.right,
        found.bias,
        windows.stride,
        padding,
        windows.dilation,
        found.groups,
        windows.transposed,
    )


def _linear(found: Product) -> Affine | None:
    node, weight = found.node, found.right
    if node.target is aten.linear.default:
        return Affine(node, node, found.left, weight, found.bias)
    is_known = weight.op == "get_attr" or operator_key(node) == "Gemm"
    if not is_known or found.turned[0] or len(tensor_spec(weight).shape) != 2 or len(tensor_spec(found.left).shape) < 2:
        return None
    out = tensor_spec(node)
    if found.scale == 0 or (found.bias is not None and not (_is_vector(found.bias, out) and found.bias_scale)):
        return None
    return Affine(
        node,
        node,
        found.left,
        weight,
        found.bias,
        turned=not found.turned[1],
        scale=float(found.scale),
        bias_scale=float(found.bias_scale) or 1.0,
    )


def _is_vector(bias: fx.Node, out: TensorSpec) -> bool:
    """Say whether an operand is one number, or one for each entry of the last dimension of ``out``."""
    spec = spec_of(bias)
    if not isinstance(spec, TensorSpec) or len(spec.shape) > len(out.shape) or spec.dtype is not out.dtype:
        return False
    return prod(spec.shape) == 1 or (spec.shape[-1] == out.shape[-1] == prod(spec.shape))


def _summed(node: fx.Node) -> Affine | None:
    """Return the layer of a MatMul and the Add of its bias, of which ``node`` is the latter."""
    if operator_key(node) != "Add":
        return None
    out = tensor_spec(node)
    operands: Sequence[Any] = node.args
    for product, bias in (operands, operands[::-1]):
        if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            continue
        if product.op != "call_function" or operator_key(product) != "MatMul" or len(product.users) > 1:
            continue
        layer = _layer(product)
        if layer is None or layer.bias is not None or tensor_spec(product) != out or not _is_vector(bias, out):
            continue
        return Affine(node, product, layer.input, layer.weight, bias, turned=layer.turned)
    return None


# -- batch normalisation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """A batch norm, ``y = weight (x - running_mean) / sqrt(running_var + eps) + bias`` by entry of dimension 1.

    Attributes:
        node: the call.
        input: the node it reads.
        statistics: the nodes of ``weight``, ``bias``, ``running_mean`` and ``running_var``, as far as it has them.
        eps: what is added to the variance.
        training: whether it normalises by the statistics of the batch.
    """

    node: fx.Node
    input: fx.Node
    statistics: dict[str, fx.Node]
    eps: float
    training: bool


_STATISTICS: Final = ("weight", "bias", "running_mean", "running_var")


def norm_of(node: fx.Node) -> Norm | None:
    """Return the batch norm that a call is; None for any other."""
    if node.op != "call_function":
        return None
    if node.target is aten.batch_norm.default:
        call = Call(node)
        given = {name: call[name] for name in _STATISTICS if call[name] is not None}
        return Norm(node, call["input"], given, call["eps"], bool(call["training"]))
    if operator_key(node) == "BatchNormalization":
        call = Call(node)
        names = ("scale", "B", "input_mean", "input_var")
        given = {name: call[own] for name, own in zip(_STATISTICS, names, strict=True)}
        training = bool(call["training_mode"]) or not isinstance(spec_of(node), TensorSpec)
        return Norm(node, call["X"], given, float(call["epsilon"]), training)
    return None

"""Find the channels of every value that are one number, whatever the inputs are.

What may live here: constant propagation by channel. For each value and each of its dimensions, which positions hold
one number throughout, and which number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.aliases import roots, written
from graphopt.dialects.aten.common import overloads
from graphopt.dialects.layers import LAYERS, Affine, norm_of, read_product
from graphopt.dialects.onnx.operators import Op
from graphopt.dialects.products import operator_key
from graphopt.graph import Call, Graph, TensorSpec, spec_of, tensor_spec
from graphopt.passes.canonicalize.identities import RESHAPING
from graphopt.passes.merge.scaling import is_padded
from graphopt.passes.shapes import permutation

__all__ = ["Channels", "Constancy", "constancy", "padded", "reads"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Channels:
    """Which positions of a dimension hold one number, and that number in float64 (0 where ``known`` says no)."""

    known: np.ndarray[Any, np.dtype[np.bool_]]
    value: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def any(self) -> bool:
        """Say whether there is such a position."""
        return bool(self.known.any())


Dims: TypeAlias = dict[int, Channels]
"""The dimensions of a value that have constant positions."""

Constancy: TypeAlias = Mapping[fx.Node, Dims]


def constancy(graph: Graph) -> dict[fx.Node, Dims]:
    """Return the constant positions of every value, in one sweep. Finite activations are taken for granted."""
    found: dict[fx.Node, Dims] = {}
    changing = _read_late(graph)
    for node in graph.nodes:
        rule = _RULES.get(operator_key(node)) if node.op == "call_function" and node not in changing else None
        if node.op == "get_attr" and node not in changing:
            rule = _vector
        spec = spec_of(node)
        dims: Dims = {}
        if rule is not None and (isinstance(spec, TensorSpec) or operator_key(node) in _SPLITS):
            dims = rule(graph, node, found)
        found[node] = {
            dim: channels
            for dim, channels in dims.items()
            if channels.any and (not isinstance(spec, TensorSpec) or not spec.dynamic[dim])
        }
    return found


def _read_late(graph: Graph) -> set[fx.Node]:
    """Return the values that a call writes into before they are read, so that readers see something else."""
    root_of = roots(graph.nodes)
    order = {node: place for place, node in enumerate(graph.nodes)}
    last = {root_of[target]: node for node in graph.nodes for target in written(node)}
    late = {
        root_of[node]
        for node in graph.nodes
        if (writer := last.get(root_of[node])) is not None
        and order[node] < order[writer]
        and any(order[user] > order[writer] for user in node.users)
    }
    late |= {root for root in last if root.op != "call_function"}
    return {node for node in graph.nodes if root_of[node] in late}


def _vector(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Return the entries of a tensor of the model that has one number a position of one dimension."""
    spec = spec_of(node)
    if not isinstance(spec, TensorSpec) or not spec.dtype.is_floating_point:
        return {}
    wide = [dim for dim, size in enumerate(spec.shape) if size > 1]
    if len(wide) != 1:
        return {}
    value = graph.tensor(str(node.target)).detach().double().reshape(-1).cpu().numpy()
    return {wide[0]: Channels(np.isfinite(value), value)}


# -- layers --


def reads(layer: Affine) -> int:
    """Return the dimension of a layer's input that holds its channels."""
    return len(tensor_spec(layer.input).shape) + layer.channel


def padded(layer: Affine) -> bool:
    """Say whether a layer reads zeros around its input; then a constant is none at the border.

    Of a transposed convolution, outputs at the border and between strides sum fewer products.
    """
    return layer.transposed or is_padded(layer)


def _parameter(graph: Graph, node: Any) -> Tensor | None:
    is_tensor = isinstance(node, fx.Node) and node.op == "get_attr"
    return graph.tensor(str(node.target)).detach().double() if is_tensor else None


def _layer(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Return the rows that read constants alone, or nothing: their bias, and what these add up to."""
    layer = read_product(node)
    if layer is None or layer.transposed or layer.weight.op != "get_attr":
        return {}
    if layer.bias is not None and layer.bias.op != "get_attr":
        return {}
    weight, bias = layer.kernel_values(graph), layer.bias_values(graph)
    groups = layer.groups
    rows = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    used = (weight.flatten(2) != 0).any(2) if weight.dim() > 2 else weight != 0
    value = bias.numpy().copy() if bias is not None else np.zeros(len(weight))
    given = found[layer.input].get(reads(layer))
    if given is None:
        known = ~used.any(1).numpy()
        return {reads(layer): Channels(known, np.where(known, value, 0.0))}
    usable = given.known & (given.value == 0) if padded(layer) else given.known
    columns = np.broadcast_to(usable.reshape(groups, 1, -1), (groups, len(weight) // groups, weight.shape[1]))
    numbers = np.broadcast_to(given.value.reshape(groups, 1, -1), columns.shape)
    known = ~(used.numpy() & ~columns.reshape(used.shape)).any(1)
    value = value + (rows.numpy() * np.where(columns, numbers, 0.0).reshape(rows.shape)).sum(1)
    return {reads(layer): Channels(known, np.where(known, value, 0.0))}


def _batch_norm(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    norm = norm_of(node)
    if norm is None or norm.training or "running_mean" not in norm.statistics:
        return {}
    given = {name: _parameter(graph, each) for name, each in norm.statistics.items()}
    if any(each is None for each in given.values()):
        return {}
    weight, bias, mean, var = (given.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    assert mean is not None
    assert var is not None
    scale = (var + norm.eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - scale * mean
    before = found[norm.input].get(1, _unknown(len(mean)))
    flat = (scale == 0).numpy()
    known = before.known | flat
    value = np.where(flat, shift.numpy(), scale.numpy() * before.value + shift.numpy())
    return {1: Channels(known, np.where(known, value, 0.0))}


# -- one position at a time --


def _unknown(size: int) -> Channels:
    return Channels(np.zeros(size, dtype=np.bool_), np.zeros(size))


def _function(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Apply an operator on single entries to the constants."""
    x = node.args[0]
    target: Any = node.target
    if not isinstance(x, fx.Node) or any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return {}
    result: Dims = {}
    for dim, channels in found[x].items():
        with torch.no_grad():
            value = target(torch.from_numpy(channels.value.copy()), *node.args[1:], **node.kwargs).double().numpy()
        known = channels.known & np.isfinite(value)
        result[dim] = Channels(known, np.where(known, value, 0.0))
    return result


def _same(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    x = node.args[0]
    return dict(found[x]) if isinstance(x, fx.Node) else {}


def _dropout(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    return {} if Call(node)["train"] else _same(graph, node, found)


def _operand(graph: Graph, value: Any, dim: int, rank: int, size: int, found: Constancy) -> Channels:
    """Return what is known of an operand along dimension ``dim`` of the result."""
    if isinstance(value, int | float):
        return Channels(np.ones(size, dtype=np.bool_), np.full(size, float(value)))
    if not isinstance(value, fx.Node) or not isinstance(spec := spec_of(value), TensorSpec):
        return _unknown(size)
    own = dim - (rank - len(spec.shape))
    if value.op == "get_attr" and prod(spec.shape) == 1:
        return _operand(graph, float(graph.tensor(str(value.target)).detach()), dim, rank, size, found)
    known = found[value].get(own) if own >= 0 else None
    return known if known is not None and len(known.known) == size else _unknown(size)


def _binary(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Constants give constants, and a factor of zero gives zero."""
    call = Call(node)
    spec = tensor_spec(node)
    rank = len(spec.shape)
    name = _NAMES[operator_key(node)]
    second = call["B" if isinstance(node.target, Op) else "other"]
    if call.has("rounding_mode") and call["rounding_mode"] is not None:
        return {}
    result: Dims = {}
    for dim, size in enumerate(spec.shape):
        if spec.dynamic[dim]:
            continue
        a, b = (_operand(graph, each, dim, rank, size, found) for each in (node.args[0], second))
        if not (a.any or b.any):
            continue
        known = a.known & b.known
        with np.errstate(all="ignore"):
            value = _ARITHMETIC[name](a.value, b.value * (call["alpha"] if call.has("alpha") else 1))
        if name in ("mul", "div"):
            zero = a.known & (a.value == 0)
            zero |= (b.known & (b.value == 0)) if name == "mul" else False
            zero &= ~(b.known & (b.value == 0)) if name == "div" else True
            known, value = known | zero, np.where(zero, 0.0, value)
        known = known & np.isfinite(value)
        result[dim] = Channels(known, np.where(known, value, 0.0))
    return result


# -- shapes --


def _permute(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    order, x = permutation(node), node.args[0]
    given = found[x]  # type: ignore[index]
    return {} if order is None else {dim: given[old] for dim, old in enumerate(order) if old in given}


def _reshape(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Carry a dimension that stays, or becomes a part of a longer one (channels of a flattened image)."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not found[x]:
        return {}
    old, new = tensor_spec(x), tensor_spec(node)
    result: Dims = {}
    for dim, channels in found[x].items():
        inner = prod(old.shape[dim + 1 :])
        if any(old.dynamic[dim:]):
            continue
        for place, size in enumerate(new.shape):
            after = prod(new.shape[place + 1 :])
            count = len(channels.known) * (inner // after)
            # The new dimension is (outer, channels, rest), with nothing behind the rest but `after`.
            if any(new.dynamic[place:]) or size <= 1 or inner % after or size % count:
                continue
            result[place] = Channels(
                *(np.tile(np.repeat(each, inner // after), size // count) for each in (channels.known, channels.value))
            )
            break
    return result


def _cat(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    call = Call(node)
    is_onnx = isinstance(node.target, Op)
    parts, spec = call["inputs" if is_onnx else "tensors"], tensor_spec(node)
    along = call["axis" if is_onnx else "dim"] % len(spec.shape)
    if any(len(tensor_spec(part).shape) != len(spec.shape) for part in parts):
        return {}
    sizes = [tensor_spec(part).shape for part in parts]
    result: Dims = {}
    for dim in {d for part in parts for d in found[part]}:
        each = [found[part].get(dim, _unknown(shape[dim])) for part, shape in zip(parts, sizes, strict=True)]
        if dim == along:
            result[dim] = Channels(*(np.concatenate([getattr(c, f) for c in each]) for f in ("known", "value")))
        else:
            known = np.all([c.known & (c.value == each[0].value) for c in each], axis=0)
            result[dim] = Channels(known, np.where(known, each[0].value, 0.0))
    return result


def _split(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    return _same(graph, node, found)


def _item(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Take a part of a split."""
    parts, index = node.args
    if not isinstance(parts, fx.Node) or operator_key(parts) not in _SPLITS or not isinstance(index, int):
        return {}
    specs = spec_of(parts)
    x = parts.args[0]
    if not isinstance(specs, tuple) or not isinstance(x, fx.Node):
        return {}
    along = Call(parts)["axis" if isinstance(parts.target, Op) else "dim"] % len(tensor_spec(x).shape)
    start = sum(s.shape[along] for s in specs[: index % len(specs)] if isinstance(s, TensorSpec))
    stop = start + tensor_spec(node).shape[along]
    return {
        dim: Channels(c.known[start:stop], c.value[start:stop]) if dim == along else c for dim, c in found[x].items()
    }


def _slice(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    call = Call(node)
    x = call["self"]
    along = call["dim"] % len(tensor_spec(x).shape)
    bounds = (call["start"], call["end"], call["step"])
    result = {dim: channels for dim, channels in found[x].items() if dim != along}
    if along in found[x] and not any(isinstance(bound, fx.Node) for bound in bounds):
        channels = found[x][along]
        result[along] = Channels(channels.known[slice(*bounds)], channels.value[slice(*bounds)])
    return result


def _onnx_slice(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    call = Call(node)
    given = [call[name] for name in ("starts", "ends", "axes", "steps")]
    if not all(each is None or isinstance(each, list | tuple) for each in given):
        return {}
    starts, ends, axes, steps = given
    x = call["data"]
    rank = len(tensor_spec(x).shape)
    result = dict(found[x])
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        along = axis % rank
        bounds = (starts[place], ends[place], 1 if steps is None else steps[place])
        channels = result.pop(along, None)
        if channels is not None and all(isinstance(bound, int) for bound in bounds) and bounds[2] > 0:
            result[along] = Channels(channels.known[slice(*bounds)], channels.value[slice(*bounds)])
    return result


def _pooling(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Pooling and resampling of ONNX: dimension 1 holds the channels."""
    call = Call(node)
    x = node.args[0]
    if not isinstance(x, fx.Node) or not isinstance(spec_of(node), TensorSpec):
        return {}
    given = found[x].get(1)
    same = tensor_spec(x).shape[1] == tensor_spec(node).shape[1]
    if given is None or not same or (call.has("mode") and str(call["coordinate_transformation_mode"]).startswith("tf")):
        return {}
    padded_ = str(call["auto_pad"]) not in ("NOTSET", "VALID") or any(call["pads"] or ()) if call.has("pads") else False
    zeros = padded_ and call.has("count_include_pad") and bool(call["count_include_pad"])
    known = given.known & (given.value == 0) if zeros else given.known
    return {1: Channels(known, np.where(known, given.value, 0.0))}


def _reduced(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    call = Call(node)
    x = call["data"]
    rank = len(tensor_spec(x).shape)
    axes = call["axes"]
    if isinstance(axes, fx.Node):
        return {}
    if not axes and call.has("noop_with_empty_axes") and call["noop_with_empty_axes"]:
        return _same(graph, node, found)
    dims = {dim % rank for dim in (axes or range(rank))}
    left = [dim for dim in range(rank) if call["keepdims"] or dim not in dims]
    return {place: found[x][dim] for place, dim in enumerate(left) if dim in found[x] and dim not in dims}


def _cast(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Look through casts to wider types; a narrower one rounds, as what takes a constant's place would not."""
    x, out = node.args[0], tensor_spec(node)
    wide = isinstance(x, fx.Node) and out.dtype.is_floating_point and tensor_spec(x).dtype.is_floating_point
    return _same(graph, node, found) if wide and out.dtype.itemsize >= tensor_spec(x).dtype.itemsize else {}


def _onnx_dropout(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    return {} if Call(node)["training_mode"] not in (None, False, 0) else _same(graph, node, found)


def _spatial(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    """Pooling and resampling are averages, or maxima, over places of one channel; the first spatial dimension is 2."""
    x = node.args[0]
    if not isinstance(x, fx.Node):
        return {}
    call = Call(node)
    channel = len(tensor_spec(x).shape) - _SPATIAL[node.target]
    counts = call.has("count_include_pad") and call["count_include_pad"]
    if call.has("divisor_override") and call["divisor_override"] is not None:
        return {}
    zeros = counts and any(entry != 0 for entry in call["padding"])
    given = found[x].get(channel - 1)
    if given is None:
        return {}
    known = given.known & (given.value == 0) if zeros else given.known
    return {channel - 1: Channels(known, np.where(known, given.value, 0.0))}


def _mean(graph: Graph, node: fx.Node, found: Constancy) -> Dims:
    call = Call(node)
    x = call["self"]
    rank = len(tensor_spec(x).shape)
    dims = {dim % rank for dim in (call["dim"] or range(rank))}
    left = [dim for dim in range(rank) if call["keepdim"] or dim not in dims]
    return {place: found[x][dim] for place, dim in enumerate(left) if dim in found[x] and dim not in dims}


# -- the tables --

Rule: TypeAlias = Callable[[Graph, fx.Node, Constancy], Dims]

_ARITHMETIC: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_NAMES: Final[dict[Any, str]] = {
    **{getattr(aten, f"{name}{suffix}").Tensor: name for name in _ARITHMETIC for suffix in ("", "_")},
    **{name.capitalize(): name for name in _ARITHMETIC},
}
_SPLITS: Final = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, "Split"})
_FUNCTIONS: Final = (
    "relu", "relu_", "relu6", "gelu.default", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh",
    "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "leaky_relu", "leaky_relu_", "elu", "elu_",
    "mish", "mish_", "softplus", "exp.default", "abs", "neg", "sqrt", "clamp.default", "clamp_min.default",
    "clamp_max.default", "pow.Tensor_Scalar", "erf", "selu", "celu",
)  # fmt: skip
_ONNX_FUNCTIONS: Final = (
    "Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu", "com.microsoft.Gelu",
    "com.microsoft.QuickGelu",
)  # fmt: skip
_SAME: Final = (
    "clone", "contiguous", "alias", "detach", "to.dtype", "to.dtype_layout", "to.device", "_to_copy", "lift_fresh_copy",
)  # fmt: skip
_SPATIAL: Final[dict[Any, int]] = {
    operator_: rank
    for rank in (1, 2, 3)
    for name in (f"max_pool{rank}d", f"avg_pool{rank}d", f"adaptive_avg_pool{rank}d", f"upsample_nearest{rank}d")
    for operator_ in overloads(name)
} | dict.fromkeys(overloads("upsample_bilinear2d"), 2)

_RULES: Final[dict[Any, Rule]] = {
    **dict.fromkeys(LAYERS, _layer),
    **dict.fromkeys((aten.batch_norm.default, "BatchNormalization"), _batch_norm),
    **dict.fromkeys(_ONNX_FUNCTIONS, _function),
    "Identity": _same,
    "Cast": _cast,
    "Dropout": _onnx_dropout,
    "Transpose": _permute,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Concat": _cat,
    "Split": _split,
    "Slice": _onnx_slice,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"), _pooling),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin"), _reduced),
    **dict.fromkeys(overloads(*_FUNCTIONS), _function),
    **dict.fromkeys(overloads(*_SAME), _same),
    **dict.fromkeys(overloads("dropout", "dropout_", "feature_dropout"), _dropout),
    **dict.fromkeys(_NAMES, _binary),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default), _permute),
    **dict.fromkeys(RESHAPING, _reshape),
    aten.cat.default: _cat,
    **dict.fromkeys(_SPLITS, _split),
    operator.getitem: _item,
    aten.slice.Tensor: _slice,
    **dict.fromkeys(_SPATIAL, _spatial),
    aten.mean.dim: _mean,
}
"""What each operator makes of constants; any other makes nothing that is known."""

"""Write normalisations that are spelled out as the one operator that computes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import add_tensor, insert, read, remove_dead
from graphopt.editing import replace as replace_value
from graphopt.graph import Call, Graph
from graphopt.passes.fuse.opsets import SINCE, offers, require
from graphopt.passes.onnx_calls import constant, is_call, number, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import plural


@register
@dataclass(frozen=True)
class FuseNormalizations(Pass):
    """Make one operator of a layer or root-mean-square normalisation that is spelled out.

    With m the mean over the last dimensions: ``(x - m(x)) / sqrt(m((x - m(x))²) + e) * w + b`` is a LayerNormalization
    and ``x / sqrt(m(x²) + e) * w`` an RMSNormalization, whether the square is a product or a power, and whether the
    root divides or its reciprocal multiplies; a weight that is not there is 1. Where the file's version has no
    RMSNormalization, a product with the root's reciprocal becomes a division by the root: a call less, and the form in
    which ONNX Runtime fuses it. Exact up to rounding.

    Left as they are: means over other dimensions than the last ones, and regions of whose inner values others read any.

    Args:
        raise_opset: let the file declare the least version that has the operator.

    Source: Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    name: ClassVar[str] = "fuse-normalizations"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    raise_opset: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        for node in list(graph.nodes):
            if is_call(node, "Div", "Mul") and (found := _read(graph, node)) is not None:
                self._fuse(graph, found, context)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)

    def _fuse(self, graph: Graph, found: _Norm, context: Context) -> None:
        site = found.end.name
        if isinstance(found.refusal, str):
            context.skipped(site, found.refusal)
            return
        name = "LayerNormalization" if found.centred else "RMSNormalization"
        if offers(graph, name, raise_opset=self.raise_opset):
            if context.allows(site):
                whole = _with_affine(graph, found)
                _replace(graph, whole, name)
                context.applied(site, f"{plural(len(whole.inner), 'call')} make {name}")
        elif found.root is not None and is_call(found.end, "Mul"):
            if context.allows(site):
                new = insert(graph, found.end, op("Div"), (found.numerator, found.root), like=found.end)
                replace_value(found.end, new)
                context.applied(site, "divides by the root instead of multiplying by its reciprocal")
        else:
            context.skipped(site, f"{name} is there from opset {SINCE[name]} on (raise_opset)")


@dataclass(frozen=True)
class _Norm:
    """A normalisation: of ``x`` from dimension ``axis`` on, and the calls that compute it up to ``end``."""

    end: fx.Node
    x: fx.Node
    numerator: fx.Node
    root: fx.Node | None
    axis: int
    epsilon: float
    centred: bool
    inner: frozenset[fx.Node]
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    refusal: str | None = None


def _read(graph: Graph, end: fx.Node) -> _Norm | None:
    """Return the normalisation that a call ends, without weight and bias."""
    for top, scale, inverted in _quotients(graph, end):
        deviation = _deviation(graph, scale)
        if deviation is None:
            continue
        inside, variance, epsilon, root = deviation
        mean = _mean_of_square(graph, variance)
        if mean is None or mean[0] is not top:
            continue
        _, axes, more = mean
        inner = {end, *inverted, *inside, *more}
        spec = tensor_type(top)
        if spec is None:
            return None
        rank = len(spec.shape)
        own = _centred(top, axes, rank)
        if own is not None:
            inner |= {top, own}
        x = top.args[0] if own is not None else top
        axis = min(axes)
        refusal = None
        if axes != tuple(range(axis, rank)):
            refusal = f"the mean is over dimensions {', '.join(map(str, axes))} of {rank}, which are not the last ones"
        elif outside := [node.name for node in sorted(inner - {end}) if not set(node.users) <= inner]:
            refusal = f"others read {outside[0]}"
        return _Norm(end, x, top, root, axis, epsilon, own is not None, frozenset(inner), refusal=refusal)  # type: ignore[arg-type]
    return None


def _quotients(graph: Graph, end: fx.Node) -> list[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Return how a call may be a quotient: numerator, denominator, and the calls that invert the denominator."""
    a, b = end.args[:2]
    if is_call(end, "Div"):
        return [(a, b, [])] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []
    found = []
    for top, factor in ((a, b), (b, a)):
        if is_call(factor, "Reciprocal"):
            found.append((top, factor.args[0], [factor]))  # type: ignore[union-attr]
        elif is_call(factor, "Div") and number(graph, factor.args[0]) == 1:  # type: ignore[union-attr]
            found.append((top, factor.args[1], [factor]))  # type: ignore[union-attr]
        elif is_call(factor, "Pow") and number(graph, factor.args[1]) == -0.5:  # type: ignore[union-attr]
            found.append((top, factor, []))
    return found  # type: ignore[return-value]


def _deviation(graph: Graph, scale: Any) -> tuple[list[fx.Node], fx.Node, float, fx.Node | None] | None:
    """Read ``sqrt(variance + epsilon)``: its calls, the variance, epsilon, and the root where there is one."""
    if not is_call(scale, "Sqrt", "Pow") or (is_call(scale, "Pow") and number(graph, scale.args[1]) not in (0.5, -0.5)):
        return None
    root = None if number(graph, scale.args[1] if is_call(scale, "Pow") else None) == -0.5 else scale
    total = scale.args[0]
    if not is_call(total, "Add"):
        return None
    for variance, added in (total.args[:2], total.args[1::-1]):
        epsilon = number(graph, added)
        if epsilon is not None and epsilon >= 0:
            return [scale, total], variance, epsilon, root
    return None


def _mean_of_square(graph: Graph, mean: Any) -> tuple[fx.Node, tuple[int, ...], list[fx.Node]] | None:
    """Read ``mean(t²)``: t, the dimensions, and the calls."""
    axes = _axes(mean)
    if axes is None:
        return None
    square = mean.args[0]
    if is_call(square, "Pow") and number(graph, square.args[1]) == 2:
        return square.args[0], axes, [mean, square]
    if is_call(square, "Mul") and square.args[0] is square.args[1]:
        return square.args[0], axes, [mean, square]
    return None


def _axes(mean: Any) -> tuple[int, ...] | None:
    """Return the dimensions that a ReduceMean takes the mean over, and keeps."""
    spec = tensor_type(mean.args[0]) if is_call(mean, "ReduceMean") else None
    if spec is None:
        return None
    call = Call(mean)
    axes = call["axes"]
    if not call["keepdims"] or not isinstance(axes, list | tuple) or not axes:
        return None
    return tuple(sorted(axis % len(spec.shape) for axis in axes))


def _centred(value: fx.Node, axes: tuple[int, ...], rank: int) -> fx.Node | None:
    """Return the mean that ``value = x - mean(x)`` takes off; None for any other value."""
    if not is_call(value, "Sub"):
        return None
    x, mean = value.args[:2]
    return mean if _axes(mean) == axes and mean.args[0] is x else None  # type: ignore[union-attr, return-value]


# -- weight and bias --


def _with_affine(graph: Graph, norm: _Norm) -> _Norm:
    """Take in the weight, and for a layer normalisation the bias, where they follow."""
    norm = _following(graph, norm, "Mul")
    return _following(graph, norm, "Add") if norm.centred and norm.weight is not None else norm


def _following(graph: Graph, norm: _Norm, name: str) -> _Norm:
    """Take in the product with a weight or the sum with a bias, where nothing else reads the value so far."""
    users = list(norm.end.users)
    if len(users) != 1 or not is_call(users[0], name) or norm.end in graph.module.graph.output_node().all_input_nodes:
        return norm
    others = [each for each in users[0].args[:2] if each is not norm.end]
    spec = tensor_type(norm.x)
    if len(others) != 1 or spec is None or any(spec.dynamic[norm.axis :]) or constant(graph, others[0]) is None:
        return norm
    shape = tensor_type(others[0]).shape  # type: ignore[union-attr]
    wanted = spec.shape[norm.axis :]
    if shape[-len(wanted) :] != wanted or any(size != 1 for size in shape[: -len(wanted)]):
        return norm
    inner = norm.inner | {users[0]}
    if name == "Mul":
        return replace(norm, end=users[0], inner=inner, weight=others[0])  # type: ignore[arg-type]
    return replace(norm, end=users[0], inner=inner, bias=others[0])  # type: ignore[arg-type]


def _replace(graph: Graph, norm: _Norm, name: str) -> None:
    require(graph, name)
    spec = tensor_type(norm.x)
    assert spec is not None
    shape = spec.shape[norm.axis :]
    operands = [_tensor(graph, norm, norm.weight, shape)]
    if norm.bias is not None:
        operands.append(_tensor(graph, norm, norm.bias, shape))
    attributes = {"axis": norm.axis - len(spec.shape), "epsilon": norm.epsilon}
    replace_value(norm.end, insert(graph, norm.end, op(name), (norm.x, *operands), attributes, like=norm.end))


def _tensor(graph: Graph, norm: _Norm, node: fx.Node | None, shape: tuple[int, ...]) -> fx.Node:
    """Return weight or bias in the shape of what is normalised; ones where there is none."""
    if node is None:
        ones = torch.ones(shape, dtype=tensor_type(norm.x).dtype)  # type: ignore[union-attr]
        return read(graph, add_tensor(graph, f"{norm.end.name}_weight", ones), norm.end)
    name = str(node.target)
    tensor = graph.tensor(name)
    if tuple(tensor.shape) == shape:
        return read(graph, name, norm.end)
    changed = tensor.detach().reshape(shape)
    ahead = tensor.dim() - len(shape)
    made = nn.Parameter(changed, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else changed
    sources = {dim: graph.stands_for(name, dim + ahead) for dim in range(len(shape))}
    return read(graph, add_tensor(graph, f"{name}_flat", made, sources=sources), norm.end)

"""Merge two linear maps in a row into one, where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.dialects.onnx.operators import Op
from graphopt.editing import add_tensor, read, remove_dead, replace
from graphopt.graph import Graph
from graphopt.passes.affine import (
    Affine,
    Geometry,
    expanded,
    insert_layer,
    joint_name,
    made_of,
    overwritten,
    read_affine,
    saving,
    sibling,
    unavailable,
)
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import listing


@register
@dataclass(frozen=True)
class MergeConsecutive(Pass):
    """Merge linear layers or convolutions that follow each other directly, where their product is cheaper.

    For linear layers ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``. For convolutions, with taps u of the second
    and v of the first, of which in every dimension one has extent one,

        W[o, i, u, v] = sum_m W2[o, m, u] W1[m, i, v]        b[o] = sum_{m, u} W2[o, m, u] b1[m] + b2[o].

    The second convolution steps through the first one's places: strides multiply, ``s = s1 s2``, and the second's
    dilation and padding count in steps of the first, ``s1 d2`` and ``s1 p2``. Groups fall to those the two have in
    common, gcd(g1, g2). Exact up to rounding; the product is formed in float64.

    Zero padding of the second convolution pads with 0 where the merged one has b1, so it needs a first one without
    bias. A product that takes more multiply-adds or parameters than the two, as after a bottleneck, is not formed.
    In training the product is one map with fewer directions to go; outputs are equal in either mode.

    Source: the algebra of over-parameterised linear blocks, Guo et al. 2020, arXiv:1811.10495, section 3.
    """

    name: ClassVar[str] = "merge-consecutive"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        waiting = [node for node in graph.nodes if read_affine(node) is not None]
        while waiting:
            node = waiting.pop(0)
            second = read_affine(node)
            first = None if second is None else read_affine(second.input)
            if first is None or second is None or not _alike(first, second):
                continue
            site = f"{first.node.name}, {second.node.name}"
            reason = _obstacle(graph, first, second)
            if reason is None and not context.allows(site):
                continue
            if reason is not None:
                context.skipped(site, reason)
                continue
            geometry = _composed(first, second)
            biased = first.bias is not None or second.bias is not None
            before = (first.macs + second.macs, first.params + second.params)
            after = (geometry.macs(second.out), prod(geometry.shape) + biased * geometry.shape[0])
            if after[0] > before[0] or after[1] > before[1]:
                context.skipped(site, f"one map would be dearer: {saving(before, after)}")
                continue
            waiting.insert(0, _merge(graph, first, second, geometry))
            context.applied(
                site, f"merged: {saving(before, after)}", macs=(before[0], after[0]), params=(before[1], after[1])
            )
        remove_dead(graph)
        return PassResult(graph)


def _alike(first: Affine, second: Affine) -> bool:
    """Say whether two maps are of one kind; a Gemm, which wants matrices, takes the place of none on other tensors."""
    if not second.is_linear:
        return first.product.target is second.product.target
    return first.is_linear and isinstance(first.product.target, Op) is isinstance(second.product.target, Op)


def _obstacle(graph: Graph, first: Affine, second: Affine) -> str | None:
    """Say why two maps that follow each other stay two."""
    others = [user.name for user in first.node.users if user is not second.product]
    if others:
        return f"{listing(others)} read {first.node.name}, too"
    reason = unavailable(graph, (first.weight, first.bias, second.weight, second.bias))
    if reason is not None:
        return reason
    writer = overwritten(first.input, second.node)
    if writer is not None:
        return f"{writer.name} writes into {first.input.name} before {second.node.name} runs"
    for dim, (one, two) in enumerate(zip(first.kernel, second.kernel, strict=True)):
        if one > 1 and two > 1:
            return f"both kernels have an extent in spatial dimension {dim} ({one}, {two})"
    padding = second.geometry.padding
    if any(map(any, padding)) and first.bias is not None and bool(graph.tensor(str(first.bias.target)).any()):
        return (
            f"{second.node.name} pads with zeros {_shown(padding)}, where one convolution would have the bias of "
            f"{first.node.name}"
        )
    for dim, pair in enumerate(padding):
        if any(pair) and second.kernel[dim] == 1:
            return f"{second.node.name} pads spatial dimension {dim} by {_shown([pair])[0]} without an extent there"
    return None


def _shown(padding: Sequence[tuple[int, int]]) -> list[Any]:
    """Return paddings as they are given: one number for both sides where that is so."""
    return [first if first == last else (first, last) for first, last in padding]


def _composed(first: Affine, second: Affine) -> Geometry:
    """Return the geometry of the two maps in one."""
    groups = gcd(first.groups, second.groups)
    dims = range(len(first.kernel))
    return Geometry(
        shape=(
            second.shape[0],
            first.shape[1] * first.groups // groups,
            *(one * two for one, two in zip(first.kernel, second.kernel, strict=True)),
        ),
        stride=tuple(first.stride[d] * second.stride[d] for d in dims),
        padding=tuple(_padding(first, second, d) for d in dims),
        dilation=tuple(
            first.dilation[d] if first.kernel[d] > 1 else first.stride[d] * second.dilation[d] for d in dims
        ),
        groups=groups,
    )


def _padding(first: Affine, second: Affine, dim: int) -> tuple[int, int]:
    (before, after), step = first.geometry.padding[dim], first.stride[dim]
    more_before, more_after = second.geometry.padding[dim]
    return before + step * more_before, after + step * more_after


def product(one: Tensor, two: Tensor, groups: tuple[int, int]) -> Tensor:
    """Multiply two kernels, ``two`` after ``one``, of which in every spatial dimension one has extent one.

    Shapes: ``one`` is ``(m, i / g1, *k1)``, ``two`` ``(o, m / g2, *k2)``; the result is ``(o, i / g, *(k1 k2))`` with
    ``g = gcd(g1, g2)``.
    """
    fewer = gcd(*groups)
    one, two = expanded(one, groups[0], fewer), expanded(two, groups[1], fewer)
    extents = [a * b for a, b in zip(one.shape[2:], two.shape[2:], strict=True)]
    left = two.reshape(fewer, two.shape[0] // fewer, two.shape[1], -1)
    right = one.reshape(fewer, one.shape[0] // fewer, one.shape[1], -1)
    found = torch.einsum("gomu,gmiv->goiuv", left, right)
    # Of each spatial dimension the taps u or the taps v are the only ones, so that both orders of (u, v) are brought
    # into that of the dimensions by exchanging single entries.
    rank = len(extents)
    found = found.reshape(two.shape[0], one.shape[1], *two.shape[2:], *one.shape[2:])
    order = [0, 1, *(d for pair in zip(range(2, 2 + rank), range(2 + rank, 2 + 2 * rank), strict=True) for d in pair)]
    return found.permute(order).reshape(two.shape[0], one.shape[1], *extents)


def _merge(graph: Graph, first: Affine, second: Affine, geometry: Geometry) -> fx.Node:
    """Put one map in the place of two; return its node."""
    names = [str(first.weight.target), str(second.weight.target)]
    weights = [graph.tensor(name) for name in names]
    one, two = first.kernel_values(graph), second.kernel_values(graph)
    found = product(one, two, (first.groups, second.groups))
    value = made_of(weights, found.t() if second.turned else found)
    sources = {second.rows: graph.stands_for(names[1], second.rows)}
    if first.groups == 1:  # else the columns are those of one group, of which there may be fewer now
        sources[second.columns] = graph.stands_for(names[0], first.columns)
    weight = add_tensor(graph, joint_name(names), value, sources=sources)
    bias = _bias(graph, first, second, two)
    before = second.node
    operands = (first.input, read(graph, weight, before), None if bias is None else read(graph, bias, before))
    new = insert_layer(graph, second, before, geometry, operands)
    replace(second.node, new)
    for old in dict.fromkeys((second.node, second.product, first.node, first.product)):
        graph.module.graph.erase_node(old)
    return new


def _bias(graph: Graph, first: Affine, second: Affine, two: Tensor) -> str | None:
    """Make the bias of two maps in one, ``W2 b1 + b2``; return its name, or None where neither has a bias."""
    given = [str(bias.target) for bias in (first.bias, second.bias) if bias is not None]
    if not given:
        return None
    value = two.new_zeros(second.shape[0])
    one = first.bias_values(graph)
    if one is not None:
        summed = expanded(two.flatten(2).sum(2) if two.dim() > 2 else two, second.groups, 1)
        value = value + summed @ one
    own = second.bias_values(graph)
    if own is not None:
        value = value + own
    sources = {0: graph.stands_for(str(second.weight.target), second.rows)}
    if second.bias is not None:
        sources = {0: second.bias_sources(graph)}
    stem = sibling(joint_name([str(first.weight.target), str(second.weight.target)]), "bias")
    return add_tensor(graph, stem, made_of([graph.tensor(name) for name in given], value), sources=sources)

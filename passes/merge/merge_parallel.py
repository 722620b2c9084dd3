"""Merge linear maps that read the same input into one packed map, whose result is cut into theirs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Final

import torch
from torch import fx

from graphopt.aliases import source
from graphopt.dialects.layers import read_product
from graphopt.dialects.onnx.operators import Op, op
from graphopt.dialects.products import operator_key
from graphopt.editing import add_tensor, find_tensor, insert, read, remove_dead, replace
from graphopt.graph import Call, Graph, Source, Sources, tensor_spec
from graphopt.passes.affine import (
    Affine,
    insert_layer,
    joint_name,
    made_of,
    merged_sources,
    overwritten,
    read_affine,
    sibling,
    unavailable,
)
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import listing

aten = torch.ops.aten

PRODUCTS: Final = frozenset(
    {
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.einsum.default,
        aten.scaled_dot_product_attention.default,
        "Attention",
        "Einsum",
        "MatMul",
        "com.microsoft.Attention",
        "com.microsoft.GroupQueryAttention",
        "com.microsoft.MultiHeadAttention",
    }
)
"""Operators besides linear layers and convolutions that take most of a model's time."""


@register
@dataclass(frozen=True)
class MergeParallel(Pass):
    """Merge linear layers that read the same input, such as q, k and v, into one that yields all their features.

    With the rows of all weights one below the other, ``[y1 | y2 | …] = [W1; W2; …] x + [b1 | b2 | …]``, and each result
    is a slice of that. Multiply-adds and parameters stay what they are: the input is read once in place of k times,
    and one large product is started in place of k small ones. Slices of the last dimension are views, which cost
    nothing. Exact: every number is the same sum, up to the order in which the larger product forms it. The way back
    from ``split-parallel``: the parts of ``qkv.weight`` become ``qkv.weight`` again, of whatever widths pruning left.

    What is merged stays trainable. An operator without a bias gets one of zeros where another has one, and that can be
    trained as well. Operators with many others between them are not merged, for the results of the later ones would
    be held in memory all the while.

    Args:
        minimum: the fewest operators that are merged.
        reach: the most products, convolutions and attentions that may run between one of them and the next.
        convolutions: merge convolutions of one geometry, too. Slices of their channels are not dense, so that most
            operators copy them first, and on CPUs that takes longer than reading the input again.
    """

    name: ClassVar[str] = "merge-parallel"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    minimum: int = 2
    reach: int = 4
    convolutions: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        groups = _readers(graph)
        place = _places(graph, groups)
        for readers in groups:
            members = [each for each in readers if self._mergeable(graph, context, each)]
            for near in _near(place, members, self.reach):
                site = ", ".join(each.node.name for each in near)
                if len(near) < self.minimum:
                    context.skipped(site, f"fewer than {self.minimum} near each other read {near[0].input.name}")
                elif context.allows(site):
                    sizes = [each.shape[0] for each in near]
                    _merge(graph, near)
                    what = listing([str(size) for size in sizes], 8)
                    context.applied(site, f"merged the maps of {near[0].input.name} to {what} features", parts=sizes)
        remove_dead(graph)
        return PassResult(graph)

    def _mergeable(self, graph: Graph, context: Context, each: Affine) -> bool:
        """Say whether a map may be merged with others; a refusal is written down."""
        reason = unavailable(graph, (each.weight, each.bias))
        if reason is None and not (each.is_linear or self.convolutions):
            reason = "slices of a convolution's channels are copied (convolutions=false)"
        if reason is None and each.groups > 1:
            reason = f"its {each.groups} groups tie rows to parts of the input"
        if reason is not None:
            context.skipped(each.node.name, reason)
        return reason is None


def _readers(graph: Graph) -> list[list[Affine]]:
    """Return the maps of one input and one geometry, where there are several, in order."""
    found: dict[Any, list[Affine]] = {}
    for each in map(read_affine, graph.nodes):
        if each is not None:
            trained = each.weight.op != "get_attr" or graph.tensor(str(each.weight.target)).requires_grad
            form = (each.product.target, each.turned, each.scale, each.bias_scale)
            key = (each.input, *form, each.shape[1:], each.stride, each.padding, each.dilation, trained)
            found.setdefault((*key, tensor_spec(each.weight).dtype), []).append(each)
    return [readers for readers in found.values() if len(readers) > 1]


def _places(graph: Graph, groups: Sequence[Sequence[Affine]]) -> dict[fx.Node, int]:
    """Count, for every node, the products that run before it; those that might be merged are none.

    So a second run, which meets merged maps in their place, finds nothing nearer than the first.
    """
    candidates = {node for readers in groups for each in readers for node in (each.node, each.product)}
    counts = (
        node.op == "call_function"
        and node not in candidates
        and (operator_key(node) in PRODUCTS or read_product(node) is not None)
        for node in graph.nodes
    )
    return dict(zip(graph.nodes, accumulate(counts), strict=True))


def _near(place: Mapping[fx.Node, int], members: Sequence[Affine], reach: int) -> Iterator[list[Affine]]:
    """Cut a row of maps where more than ``reach`` products run in between, or where the input is written into."""
    if not members:
        return
    near = [members[0]]
    for each in members[1:]:
        far = place[each.node] - place[near[-1].node] > reach
        if far or overwritten(each.input, each.node, near[0].node) is not None:
            yield near
            near = []
        near.append(each)
    yield near


def _merge(graph: Graph, members: Sequence[Affine]) -> None:
    first = members[0]
    ordered, name = _packed_name(graph, members)
    weight = _joined(graph, name, [each.weight for each in ordered], ordered)
    weight_node, bias_node = read(graph, weight, first.product), None
    if any(each.bias is not None for each in ordered):
        biases = [each.bias for each in ordered]
        rows = [each.bias_sources(graph) for each in ordered if each.bias is not None]
        stem = _origin(graph, rows) or sibling(weight, "bias")
        bias = _joined(graph, stem, biases, ordered)
        bias_node = read(graph, bias, first.product)
    dim = len(first.out.shape) + first.channel
    spec = first.out.resized(
        tuple(sum(e.shape[0] for e in ordered) if d == dim else n for d, n in enumerate(first.out.shape))
    )
    packed = insert_layer(graph, first, first.product, first.geometry, (first.input, weight_node, bias_node), spec=spec)
    if isinstance(first.product.target, Op):
        if first.slot is not None:
            packed.kwargs = dict(first.product.kwargs)  # factors of product and bias among them
        _cut(graph, ordered, packed, dim)
        return
    start = 0
    for each in ordered:
        stop = start + each.shape[0]
        part = insert(graph, each.node, aten.slice.Tensor, (packed, dim, start, stop), like=each.node)
        replace(each.node, part)
        _loosen(part)
        start = stop


def _cut(graph: Graph, members: Sequence[Affine], packed: fx.Node, dim: int) -> None:
    """Let one Split cut the packed result."""
    first = min(members, key=lambda each: each.node).node
    specs = tuple(each.out for each in members)
    sizes = [each.shape[0] for each in members]
    cut = insert(graph, packed.next, op("Split"), (packed, sizes), {"axis": dim}, like=first, spec=specs)
    for index, each in enumerate(members):
        part = insert(graph, each.node, operator.getitem, (cut, index), like=each.node)
        replace(each.node, part)


def _packed_name(graph: Graph, members: Sequence[Affine]) -> tuple[list[Affine], str]:
    """Return the maps in the order in which they are packed, and the name of the packed weight.

    Parts of one tensor of the input model that follow each other there are that tensor again.
    """
    names = [str(each.weight.target) for each in members]
    rows = [graph.stands_for(name, each.rows) for name, each in zip(names, members, strict=True)]
    if _origin(graph, rows) is None:
        return list(members), joint_name(names)
    ordered = sorted(zip(members, rows, strict=True), key=lambda pair: int(pair[1][0].positions[0]))
    ends = [int(place) for _, (each,) in ordered for place in (each.positions[0], each.positions[-1])]
    if ends != sorted(ends):
        return list(members), joint_name(names)
    return [each for each, _ in ordered], rows[0][0].tensor


def _origin(graph: Graph, rows: Sequence[tuple[Source, ...]]) -> str | None:
    """Return the tensor of the input model whose rows these are, if it is one and no longer there."""
    tensors = {source.tensor for sources in rows for source in sources}
    if any(len(sources) != 1 for sources in rows) or len(tensors) != 1:
        return None
    (name,) = tensors
    return name if find_tensor(graph, name) is None else None


def _joined(graph: Graph, stem: str, nodes: Sequence[fx.Node | None], members: Sequence[Affine]) -> str:
    """Make a tensor of several, one after the other along the outputs, with zeros for those that are missing."""
    names = [None if node is None else str(node.target) for node in nodes]
    given = [graph.tensor(name) for name in names if name is not None]
    is_weight = nodes[0] is members[0].weight
    if is_weight:
        dim = members[0].rows
        rows = [graph.tensor(str(each.weight.target)).detach() for each in members]
        parts = [(each.shape[0], graph.stands_for(str(each.weight.target), dim)) for each in members]
    else:
        dim = 0
        rows = [
            given[0].new_zeros(each.shape[0])
            if name is None
            else graph.tensor(name).detach().reshape(-1).expand(each.shape[0])
            for each, name in zip(members, names, strict=True)
        ]
        parts = [(each.shape[0], each.bias_sources(graph)) for each in members]
    sources: Sources = {dim: merged_sources(parts)}
    if is_weight and given[0].dim() > 1:
        columns = members[0].columns
        found = {(s.tensor, s.dim): s for name in names if name is not None for s in graph.stands_for(name, columns)}
        sources[columns] = tuple(found.values())
    return add_tensor(graph, stem, made_of(given, torch.cat(rows, dim)), sources=sources)


def _loosen(part: fx.Node) -> None:
    """Let strict views of a part copy where they must: it does not lie as densely in memory as it did."""
    waiting = [part]
    while waiting:
        each = waiting.pop()
        for user in list(each.users):
            if source(user) is each or user.target in (aten.view.default, aten.reshape.default):
                if user.target is aten.view.default:
                    shape = Call(user)["size"]
                    user.target, user.args, user.kwargs = aten.reshape.default, (each, shape), {}
                waiting.append(user)

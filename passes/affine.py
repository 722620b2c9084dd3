"""Look at linear layers and convolutions as affine maps of one input.

What may live here: what the passes share that split, multiply or add up such maps: the reasons to leave their
parameters alone, inserting them, putting kernels into a common form, and making the new parameters. How they are read
stands in ``graphopt.dialects.layers``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final

import numpy as np
from torch import Tensor, fx, nn

from graphopt.aliases import family, written
from graphopt.dialects.layers import Affine, Geometry, read_affine, read_layer
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import Op, op
from graphopt.editing import copied, insert, readers
from graphopt.graph import SPEC, Call, Graph, Source, TensorSpec, tensor_spec
from graphopt.report.wording import listing

__all__ = [
    "Affine",
    "Geometry",
    "expanded",
    "insert_layer",
    "joint_name",
    "made_of",
    "merged_sources",
    "overwritten",
    "read_affine",
    "read_layer",
    "repeat_layer",
    "saving",
    "sibling",
    "unavailable",
]

MOST_NAMES: Final = 4
"""How many names are joined to one; of more, the first and the number of the others."""


def unavailable(graph: Graph, nodes: Iterable[fx.Node | None]) -> str | None:
    """Say why these operands cannot be replaced for their one reader; None if they can.

    Each must be a tensor of the model that has one name and one reader. In an ONNX file a vector may have several:
    exporters keep one of equal ones, which says nothing of the model, and the reader gets one of its own.
    """
    for node in nodes:
        if node is None:
            continue
        if node.op != "get_attr":
            return f"{node.name} is computed, not a tensor of the model"
        if is_onnx(graph) and prod(shape := tensor_spec(node).shape) == max((1, *shape)):
            continue
        name = str(node.target)
        names, found = graph.names(name), readers(graph, name)
        if len(names) > 1:
            return f"{name} is shared: it is also {listing(names[1:])}"
        if len(found) > 1:
            return f"{name} is shared: {listing([reader.name for reader in found])} read it"
    return None


def overwritten(value: fx.Node, until: fx.Node, since: fx.Node | None = None) -> fx.Node | None:
    """Return a call before ``until`` that writes into the memory of ``value``; None if there is none.

    Only calls after ``since`` count; without it, those after ``value`` itself.
    """
    for each in family(value):
        for user in each.users:
            if (since or value) < user < until and each in written(user):
                return user
    return None


# -- calls ------------------------------------------------------------------------------------------------------------


def insert_layer(
    graph: Graph,
    like: Affine,
    before: fx.Node,
    geometry: Geometry,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    *,
    spec: TensorSpec | None = None,
) -> fx.Node:
    """Insert a layer in the form of another, in front of ``before``; return the node that yields its result.

    Args:
        graph: the graph to edit.
        like: the layer whose operator and whose part it takes.
        before: the node that runs next.
        geometry: how it goes over its input; a linear layer's has no more than its shape.
        operands: its input, its weight as it is held, its bias.
        spec: what it yields; by default what ``like`` does.
    """
    x, weight, bias = operands
    target: Any = like.product.target
    out = spec or like.out
    if not isinstance(target, Op):
        spatial: tuple[Any, ...] = ()
        if not like.is_linear:
            padding = [first for first, _ in geometry.padding]
            spatial = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)
        arguments = (x, weight, bias, *spatial) if spatial or bias is not None else (x, weight)
        return insert(graph, before, target, arguments, like=like.node, spec=out)
    if like.slot is None:
        product = insert(graph, before, target, (x, weight), like=like.product, spec=out)
        return product if bias is None else insert(graph, before, op("Add"), (product, bias), like=like.node, spec=out)
    options = dict(like.product.kwargs)
    if like.is_linear:
        options = {name: value for name, value in options.items() if name == "transB"}
    else:
        pads = [first for first, _ in geometry.padding] + [last for _, last in geometry.padding]
        options = {
            "dilations": list(geometry.dilation),
            "group": geometry.groups,
            "kernel_shape": list(geometry.shape[2:]),
            "pads": pads,
            "strides": list(geometry.stride),
        }
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return insert(graph, before, target, inputs, options, like=like.node, spec=out)


def repeat_layer(
    graph: Graph, affine: Affine, before: fx.Node, weight: fx.Node, bias: fx.Node | None, spec: TensorSpec
) -> fx.Node:
    """Repeat a layer in front of ``before`` with another weight and bias, as they are held; return what yields it."""
    product = copied(graph, affine.product, before)
    call = Call(product)
    call[_weight_slot(product)] = weight
    product.meta[SPEC] = spec
    if affine.bias is None or bias is None:
        return product
    if affine.slot is not None:
        call[affine.slot] = bias
        return product
    result = copied(graph, affine.node, before)
    result.args = (product, bias)
    result.meta[SPEC] = spec
    return result


def _weight_slot(product: fx.Node) -> str:
    if not isinstance(product.target, Op):
        return "weight"
    return "W" if Call(product).has("W") else "B"


# -- kernels ----------------------------------------------------------------------------------------------------------


def expanded(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Write a grouped kernel as one with fewer groups, of which ``groups`` is a multiple, by filling in zeros.

    Every group of the result holds ``r = groups / fewer`` groups of the given kernel, one block each on its diagonal:
    ``(out, in / groups, *kernel)`` becomes ``(out, in / fewer, *kernel)``.
    """
    ratio = groups // fewer
    if ratio == 1:
        return weight
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    kernel = weight.shape[2:]
    blocks = weight.reshape(fewer, ratio, rows, columns, *kernel)
    result = weight.new_zeros(fewer, ratio, rows, ratio, columns, *kernel)
    for i in range(ratio):
        result[:, i, :, i] = blocks[:, i]
    return result.reshape(weight.shape[0], ratio * columns, *kernel)


def made_of(parts: Sequence[Tensor], value: Tensor) -> Tensor:
    """Return ``value`` in the type of the tensors it was made of; a parameter if one of them is, trained if one is."""
    found = value.detach().to(parts[0].dtype).contiguous()
    if not any(isinstance(part, nn.Parameter) for part in parts):
        return found
    return nn.Parameter(found, requires_grad=any(part.requires_grad for part in parts))


def saving(before: tuple[int, int], after: tuple[int, int]) -> str:
    """Write multiply-adds and parameters before and after in words."""
    pairs = zip(before, after, ("multiply-adds", "parameters"), strict=True)
    return ", ".join(f"{old:,} -> {new:,} {what}" for old, new, what in pairs)


# -- names and sources ------------------------------------------------------------------------------------------------


def joint_name(names: Sequence[str]) -> str:
    """Name a tensor made of several after them: what their names share, and in one word in what they differ.

    ``block.q.weight`` and ``block.k.weight`` give ``block.q_k.weight``.
    """
    paths = [name.split(".") for name in names]
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths}) == 1 and shared < min(map(len, paths)) - 1:
        shared += 1
    words = list(dict.fromkeys(path[shared] for path in paths))
    if len(words) > MOST_NAMES:
        words = [words[0], "and", str(len(words) - 1), "more"]
    last = paths[0][-1:] if all(len(path) > shared + 1 for path in paths) else []
    return ".".join([*paths[0][:shared], "_".join(words), *last])


def sibling(name: str, last: str) -> str:
    """Name the tensor ``last`` of the module that holds another, or after that one where no module does."""
    if "." not in name and name != "weight":
        return f"{name}_{last}"
    return ".".join([*name.split(".")[:-1], last])


def merged_sources(parts: Sequence[tuple[int, Sequence[Source]]]) -> tuple[Source, ...]:
    """Return what a dimension stands for that is the dimensions of several tensors, one after the other.

    Each part is the size of its dimension, and what that stands for. Where a part is not of a source's tensor, its
    positions there are -1: they stand for nothing.
    """
    starts = np.cumsum([0, *(size for size, _ in parts)])
    found: list[Source] = []
    for (size, sources), start in zip(parts, starts, strict=False):
        here = slice(int(start), int(start) + size)
        for source in sources:
            place = (source.tensor, source.dim)
            known = next(
                (i for i, f in enumerate(found) if (f.tensor, f.dim) == place and f.positions[here].max() < 0), None
            )
            if known is None:
                known = len(found)
                found.append(replace(source, positions=np.full(starts[-1], -1, dtype=np.int64)))
            found[known].positions[here] = source.positions
    return tuple(found)

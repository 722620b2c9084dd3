"""Look at linear layers and convolutions as affine maps of one input.

What may live here: what the passes share that split, multiply or add up such maps: reading an operator, the reasons to
leave its parameters alone, putting kernels into a common form, and making the new parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphopt.aliases import family, written
from graphopt.editing import readers
from graphopt.graph import Call, Graph, Source, Sources, TensorSpec, tensor_spec
from graphopt.report.wording import listing

__all__ = [
    "Affine",
    "Geometry",
    "expanded",
    "joint_name",
    "made_of",
    "merged_sources",
    "overwritten",
    "read_affine",
    "saving",
    "sibling",
    "sources_of",
    "unavailable",
]

aten = torch.ops.aten

CONVOLUTIONS: Final[dict[Any, int]] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
"""Convolutions with numbers for their padding, with the number of their spatial dimensions."""

MOST_NAMES: Final = 4
"""How many names are joined to one; of more, the first and the number of the others."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution goes over its input, without its weights; a linear layer has no spatial dimension.

    ``shape`` is the weight's, ``(out, in / groups, *kernel)``.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the call that follow input, weight and bias."""
        if not self.stride:
            return ()
        return (list(self.stride), list(self.padding), list(self.dilation), self.groups)

    def macs(self, out: TensorSpec) -> int:
        """Multiply-adds, for the batch of the example."""
        return prod(out.shape) * prod(self.shape[1:])


@dataclass(frozen=True)
class Affine:
    """One linear layer or convolution, ``y = W x + b``.

    A linear layer is a convolution without spatial dimensions: its weight is ``(out, in)``, that of a convolution
    ``(out, in / groups, *kernel)``; ``stride``, ``padding`` and ``dilation`` have an entry a spatial dimension.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        """Say whether it is a linear layer."""
        return self.node.target is aten.linear.default

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tensor_spec(self.weight).shape

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
        return Geometry(self.shape, self.stride, self.padding, self.dilation, self.groups)

    @property
    def macs(self) -> int:
        """Multiply-adds, for the batch of the example."""
        return self.geometry.macs(self.out)

    @property
    def params(self) -> int:
        """Entries of weight and bias."""
        return prod(self.shape) + (0 if self.bias is None else self.shape[0])


def read_affine(node: fx.Node) -> Affine | None:
    """Return the affine map that ``node`` computes; None for any other operator."""
    if node.op != "call_function":
        return None
    call = Call(node)
    if node.target is aten.linear.default:
        return Affine(node, call["input"], call["weight"], call["bias"])
    rank = CONVOLUTIONS.get(node.target)
    if rank is None:
        return None
    stride, padding, dilation = (_entries(call[name], rank) for name in ("stride", "padding", "dilation"))
    return Affine(node, call["input"], call["weight"], call["bias"], stride, padding, dilation, call["groups"])


def _entries(value: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def unavailable(graph: Graph, nodes: Iterable[fx.Node | None]) -> str | None:
    """Say why these operands cannot be replaced for their one reader; None if they can.

    Each must be a tensor of the model that has one name and one reader.
    """
    for node in nodes:
        if node is None:
            continue
        if node.op != "get_attr":
            return f"{node.name} is computed, not a tensor of the model"
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
    """Name the tensor ``last`` of the module that holds another."""
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


def sources_of(graph: Graph, names: Iterable[str | None], dims: Iterable[int]) -> Sources:
    """Return what the dimensions of a tensor stand for that is an sum of several tensors of one shape."""
    found = [name for name in names if name is not None]
    return {dim: tuple(source for name in found for source in graph.stands_for(name, dim)) for dim in dims}

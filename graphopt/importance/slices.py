"""Add up values of parameters over the slices of each index.

What may live here: the sums over a group's slices, each parameter element once for an index, and how many layers read
a group. Nothing here decides what a value is.

The slice of an index is every element of every parameter that has it in one of its axes: producers' rows, entries of
biases and norms, sinks' columns. An element that has the same index along two dimensions, as the diagonal of a square
matrix inside one group, belongs to the slice once. So does an element of a shared parameter, which the graph holds
under one name.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.axes.algebra import Atom, Axis, Concat, Product, index_at, leaves
from graphopt.axes.infer import Value
from graphopt.importance.criterion import Parameters, ScoreContext, Scores

__all__ = ["in_float", "project", "readers", "slice_sums", "squared_magnitudes"]

Floats = npt.NDArray[np.float64]

CHUNK = 1 << 18
"""How many elements are read at a time: a megabyte of float32."""


def in_float(tensor: Tensor) -> Tensor:
    """Return the tensor detached, and in float32 where its own type is too coarse to add up in."""
    return tensor.detach().float() if tensor.element_size() < 4 else tensor.detach()


def slice_sums(
    context: ScoreContext, tensors: Mapping[str, Tensor], value: Callable[[Tensor], Tensor] = in_float
) -> Scores:
    """Return, for each index of each group, the sum of the values of the elements in its slice.

    Args:
        context: the groups and the parameters.
        tensors: a tensor of each parameter's shape by the parameter's name; a missing one contributes nothing.
        value: makes the values of a tensor's elements, each of its element alone. It is applied to a few rows at a
            time, so that what it makes stays in the processor's cache.
    """
    typing = context.typing
    sums = {group.atom: np.zeros(group.size) for group in typing.groups}
    atoms = _AtomsOf(sums.keys())
    for name in context.parameters:
        if name not in tensors:
            continue
        axes = typing.tensors[name]
        dims = [dim for dim, axis in enumerate(axes) if atoms[axis]]
        for dim, marginal in _marginals(_blocks(tensors, name), dims, value):
            project(axes[dim], marginal.double().numpy(force=True), sums)
        for i, later in enumerate(dims):
            before = frozenset().union(*(atoms[axes[d]] for d in dims[:i]))
            for atom in atoms[axes[later]] & before:
                sums[atom] -= _counted_before(value(tensors[name]), axes, dims[:i], later, atom)
    return {group.name: sums[group.atom] for group in typing.groups}


def squared_magnitudes(context: ScoreContext) -> Scores:
    """Return, for each index of each group, the sum of the squares of the parameters in its slice."""
    return slice_sums(context, context.parameters, _squares)


def _squares(weight: Tensor) -> Tensor:
    return in_float(weight).square()


def readers(context: ScoreContext) -> dict[str, float]:
    """Return how many operators read each group, that is, sum products over it; by the share of the sum that it makes.

    A group that an operator multiplies and passes on, as a layer's own outputs or the channels of a depthwise
    convolution, is not read by it. The hidden width of a perceptron has one reader; a residual width every layer that
    reads the residual; one of two equal parts of a concatenation half of each layer behind. Fused attention passes on a
    width that its values share with queries and keys. Without any reader a group counts as read once, by whatever
    follows.
    """
    typing = context.typing
    shares = _Shares()
    totals = dict.fromkeys((group.atom for group in typing.groups), 0.0)
    for node, terms in typing.macs.items():
        passed = shares.of_value(typing.values.get(node))
        for axes in terms:
            for atom, share in shares.of(axes).items():
                if atom in totals:
                    totals[atom] += max(0.0, share - passed.get(atom, 0.0))
    return {group.name: totals[group.atom] or 1.0 for group in typing.groups}


class _Shares:
    """Say which share of the positions of some axes holds an index of an atom, added up over the axes."""

    def __init__(self) -> None:
        self._known: dict[int, dict[Atom, float]] = {}

    def of_value(self, value: Value) -> dict[Atom, float]:
        """Return the shares in a node's result; of several results the largest."""
        if isinstance(value, tuple):
            return self.of(value)
        found: dict[Atom, float] = {}
        for part in value or ():
            for atom, share in self.of_value(part).items():
                found[atom] = max(found.get(atom, 0.0), share)
        return found

    def of(self, axes: Sequence[Axis]) -> dict[Atom, float]:
        found: dict[Atom, float] = {}
        for axis in axes:
            for atom, share in self._of_axis(axis).items():
                found[atom] = found.get(atom, 0.0) + share
        return found

    def _of_axis(self, axis: Axis) -> dict[Atom, float]:
        known = self._known.get(id(axis))
        if known is None:
            if isinstance(axis, Concat):
                known = {}
                for part in axis.parts:
                    for atom, share in self._of_axis(part).items():
                        known[atom] = known.get(atom, 0.0) + share * part.size / axis.size
            elif isinstance(axis, Product):
                known = self.of(axis.factors)
            else:
                assert isinstance(axis, Atom)
                known = {axis: 1.0} if axis.bound is None else self._of_axis(axis.bound)
            self._known[id(axis)] = known
        return known


class _AtomsOf:
    """Say which of some atoms an axis holds; each axis object is searched once."""

    def __init__(self, atoms: Container[Atom]) -> None:
        self._wanted = atoms
        self._known: dict[int, frozenset[Atom]] = {}

    def __getitem__(self, axis: Axis) -> frozenset[Atom]:
        found = self._known.get(id(axis))
        if found is None:
            found = self._known[id(axis)] = frozenset(a for a in leaves(axis) if a in self._wanted)
        return found


def _blocks(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    return tensors.blocks(name) if isinstance(tensors, Parameters) else iter((tensors[name],))


def _marginals(
    blocks: Iterable[Tensor], dims: Sequence[int], value: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the sums of the values over all dimensions but one, for each of ``dims``, ascending.

    The first dimension is folded away as its own sums are taken, so the tensor, which comes in blocks of rows, is read
    once whatever its rank.
    """
    if not dims:
        return
    along: list[Tensor] = []
    across: Tensor | None = None
    for rows in (r for b in blocks if b.numel() for r in b.split(max(1, CHUNK * len(b) // b.numel()))):
        values = value(rows)
        if dims[0] == 0:
            along.append(values.reshape(len(values), -1).sum(1))
        if dims[-1] > 0:
            across = values.sum(0) if across is None else across.add_(values.sum(0))
    if along:
        yield 0, torch.cat(along)
    if across is not None:
        for dim, marginal in _marginals([across], [d - 1 for d in dims if d > 0], in_float):
            yield dim + 1, marginal


def project(axis: Axis, marginal: Floats, sums: dict[Atom, Floats]) -> None:
    """Add the entries of ``marginal``, one a position of ``axis``, to the indices that hold the position."""
    if isinstance(axis, Atom):
        if axis.bound is not None:
            project(axis.bound, marginal, sums)
        elif axis in sums:
            sums[axis] += marginal
    elif isinstance(axis, Product):
        grid = marginal.reshape([f.size for f in axis.factors])
        for i, factor in enumerate(axis.factors):
            project(factor, grid.sum(axis=tuple(j for j in range(grid.ndim) if j != i)), sums)
    elif isinstance(axis, Concat):
        start = 0
        for part in axis.parts:
            project(part, marginal[start : start + part.size], sums)
            start += part.size


def _counted_before(values: Tensor, axes: tuple[Axis, ...], earlier: Sequence[int], dim: int, atom: Atom) -> Floats:
    """Return, for each index of ``atom``, the sum of the elements that have it along ``dim`` and an earlier one."""
    chosen = [d for d in (*earlier, dim) if atom in leaves(axes[d])]
    rest = [d for d in range(values.dim()) if d not in chosen]
    grid = values.sum(rest) if rest else values
    ids = [
        torch.from_numpy(index_at(axes[d], atom))
        .to(grid.device)
        .reshape([-1 if j == i else 1 for j in range(len(chosen))])
        for i, d in enumerate(chosen)
    ]
    known = torch.zeros_like(grid, dtype=torch.bool)
    for other in ids[:-1]:
        known |= other == ids[-1]
    doubled = torch.where(known, grid, 0).sum(list(range(len(chosen) - 1))).double().numpy(force=True)
    last = ids[-1].reshape(-1).numpy(force=True)
    return np.bincount(last[last >= 0], doubled[last >= 0], atom.size).astype(np.float64, copy=False)

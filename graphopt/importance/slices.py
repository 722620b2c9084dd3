"""Add up values of parameters over the slices of each index.

What may live here: the sums over a group's slices, each parameter element once for an index, and how many layers a
group reaches. Nothing here decides what a value is.

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
from graphopt.importance.criterion import Parameters, ScoreContext, Scores

__all__ = ["in_float", "project", "reach", "slice_sums", "squared_magnitudes"]

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


def reach(context: ScoreContext) -> dict[str, float]:
    """Return how many layers each group reaches: the share of its elements in each weight, added up.

    A weight is a parameter of two or more dimensions. The hidden width of a perceptron reaches two layers, a residual
    width every layer that reads or writes it, one part of a concatenation its share of the layers behind.
    """
    typing = context.typing
    totals = dict.fromkeys((group.atom for group in typing.groups), 0.0)
    atoms = _AtomsOf(totals.keys())
    for name in context.parameters:
        if len(typing.tensors[name]) < 2:
            continue
        missed: dict[Atom, float] = {}
        for axis in typing.tensors[name]:
            if atoms[axis]:
                shares = {atom: np.zeros(atom.size) for atom in atoms[axis]}
                project(axis, np.full(axis.size, 1 / axis.size), shares)
                for atom, share in shares.items():
                    missed[atom] = missed.get(atom, 1.0) * (1 - float(share.sum()))
        for atom, share_missed in missed.items():
            totals[atom] += 1 - share_missed
    return {group.name: totals[group.atom] for group in typing.groups}


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

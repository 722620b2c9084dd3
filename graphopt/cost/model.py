"""Say what a model costs, as it is and for any sizes of its groups, before anything is rewritten.

What may live here: :class:`Cost`, :class:`CostModel`, and the table by layer. Units: macs are multiply-adds of matrix
products, convolutions and attention; flops = 2 * macs, stated in :attr:`Cost.flops` alone; memory is in bytes.

All numbers hold for the batch with which the model was captured: a dynamic dimension has its size in the example
inputs. Macs and activation bytes grow in proportion to the batch, parameters and weight bytes do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from graphopt.axes.algebra import Atom, Axis, Concat, Indices, Product
from graphopt.cost.liveness import allocations
from graphopt.cost.polynomial import Floats, Integers, Monomials, Peak, Polynomial, PolynomialTable, Terms, multiply
from graphopt.graph import OWNER, Spec, TensorSpec, spec_of

if TYPE_CHECKING:
    from graphopt.axes.groups import Group
    from graphopt.axes.infer import Typing

__all__ = ["Cost", "CostModel", "LayerCost", "Quantity"]


class Quantity(Protocol):
    """One number of a model as a function of its groups' sizes; never falls when a size grows."""

    def __call__(self, sizes: npt.ArrayLike) -> float:
        """Evaluate at these sizes, one a group."""
        ...

    def gradient(self, sizes: npt.ArrayLike) -> Floats:
        """Return what one more index of each group costs, to first order."""
        ...


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs, for the batch it was captured with.

    Attributes:
        macs: Multiply-adds of one forward pass.
        params: Parameters that the graph reads, a shared one once; buffers are no parameters.
        weight_bytes: Bytes of those parameters, and of the buffers and constants that the graph reads.
        activation_bytes: Bytes of all results that operators allocate in one forward pass; views, in-place operators
            and what is idle in evaluation allocate nothing.
        peak_activation_bytes: Largest number of bytes of inputs and results that are live at the same time when nodes
            run in graph order and a result is freed after its last use. Kernels' scratch memory is not counted.
    """

    macs: int
    params: int
    weight_bytes: int
    activation_bytes: int
    peak_activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two a multiply-add."""
        return 2 * self.macs

    @property
    def memory(self) -> int:
        """Bytes that inference holds at its peak: weights plus live activations."""
        return self.weight_bytes + self.peak_activation_bytes

    def to_dict(self) -> dict[str, int]:
        """Return all numbers by name, as reports print them."""
        return {
            "macs": self.macs,
            "flops": self.flops,
            "params": self.params,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "peak_activation_bytes": self.peak_activation_bytes,
            "memory": self.memory,
        }


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer contributes to the totals: ``name`` is its module's path, empty for the model itself."""

    name: str
    macs: int
    params: int
    weight_bytes: int
    activation_bytes: int


class CostModel:
    """The costs of a typed graph as polynomials in the sizes of its free groups.

    A vector of sizes has one entry a group, in the order of ``groups``; ``full`` is the one of the graph as it is.
    The quantities are attributes: polynomials ``macs``, ``flops``, ``params``, ``weight_bytes``, ``activation_bytes``,
    and the maxima of polynomials ``peak_activation_bytes`` and ``memory``. ``names`` lists every name of each tensor.

    Args:
        typing: a typed graph. Its axes are read once; later changes of the graph are not seen.
    """

    def __init__(self, typing: Typing) -> None:
        self.groups: tuple[Group, ...] = tuple(typing.groups)
        self.index: dict[Atom, int] = {group.atom: i for i, group in enumerate(self.groups)}
        self.names: dict[str, list[str]] = {name: typing.graph.names(name) for name in typing.tensors}
        self.full: Integers = np.array([group.size for group in self.groups], dtype=np.int64)
        reader = _Reader(self.index)
        tensors = typing.graph.tensors()
        self._tensors = list(tensors)
        self._parameters = np.array([isinstance(t, nn.Parameter) for t in tensors.values()], dtype=np.float64)
        self._item_bytes = np.array([t.element_size() for t in tensors.values()], dtype=np.float64)
        numels = _Rows(reader)
        for name, tensor in tensors.items():
            axes = typing.tensors.get(name)
            numels.add(reader.product(axes) if axes is not None else {(): tensor.numel()})

        self._nodes = list(typing.macs)
        macs = _Rows(reader)
        for terms in typing.macs.values():
            macs.add(*map(reader.product, terms))

        self._allocations = allocations(typing.graph)
        live = _Rows(reader)
        for allocation in self._allocations:
            node = allocation.node
            live.add(*reader.bytes(typing.values.get(node), spec_of(node)))

        self.monomials = Monomials(list(reader.columns), len(self.groups))
        self._numels, self._macs, self._live = (rows.table(self.monomials) for rows in (numels, macs, live))

    # -- quantities --

    @cached_property
    def macs(self) -> Polynomial:
        """Multiply-adds of one forward pass."""
        return self._macs.combined()

    @cached_property
    def flops(self) -> Polynomial:
        """Floating-point operations: two a multiply-add, as in :attr:`Cost.flops`."""
        return self.macs * 2.0

    @cached_property
    def params(self) -> Polynomial:
        """Parameters, a shared one once."""
        return self._numels.combined(self._parameters)

    @cached_property
    def weight_bytes(self) -> Polynomial:
        """Bytes of parameters, buffers and constants."""
        return self._numels.combined(self._item_bytes)

    @cached_property
    def activation_bytes(self) -> Polynomial:
        """Bytes of everything operators allocate in one forward pass; the model's inputs are not among it."""
        made = np.array([a.node.op != "placeholder" for a in self._allocations], dtype=np.float64)
        return self._live.combined(made)

    @cached_property
    def peak_activation_bytes(self) -> Peak:
        """Largest number of bytes of inputs and results live at once."""
        return Peak(self._live, [a.first for a in self._allocations], [a.last for a in self._allocations])

    @cached_property
    def memory(self) -> Peak:
        """Bytes of the weights plus the peak of the live activations."""
        peak = self.peak_activation_bytes
        return Peak(peak.table, peak.first, peak.last, self.weight_bytes)

    # -- evaluation --

    def sizes(self, keep: Mapping[Atom, Indices | int]) -> Integers:
        """Return the vector of sizes when groups keep these indices (or this many); the others are whole."""
        sizes = self.full.copy()
        for atom, kept in keep.items():
            sizes[self.index[atom]] = kept if isinstance(kept, int) else len(kept)
        return sizes

    def cost(self, sizes: npt.ArrayLike | None = None) -> Cost:
        """Return every total, of the graph as it is or for other sizes of its groups."""
        at = self.full if sizes is None else sizes
        return Cost(
            macs=round(self.macs(at)),
            params=round(self.params(at)),
            weight_bytes=round(self.weight_bytes(at)),
            activation_bytes=round(self.activation_bytes(at)),
            peak_activation_bytes=round(self.peak_activation_bytes(at)),
        )

    def macs_by_node(self, sizes: npt.ArrayLike | None = None) -> dict[fx.Node, int]:
        """Return the multiply-adds of each node that has any."""
        values = self._macs(self.full if sizes is None else sizes)
        return {node: round(v) for node, v in zip(self._nodes, values, strict=True)}

    def elements_by_tensor(self, sizes: npt.ArrayLike | None = None) -> dict[str, int]:
        """Return the number of elements of each parameter, buffer and constant."""
        values = self._numels(self.full if sizes is None else sizes)
        return {name: round(v) for name, v in zip(self._tensors, values, strict=True)}

    def bytes_by_node(self, sizes: npt.ArrayLike | None = None) -> dict[fx.Node, int]:
        """Return the bytes that each allocating node, or input, holds."""
        values = self._live(self.full if sizes is None else sizes)
        return {a.node: round(v) for a, v in zip(self._allocations, values, strict=True)}

    def layers(self, sizes: npt.ArrayLike | None = None) -> list[LayerCost]:
        """Return the costs by layer, in order of first use.

        An operator belongs to the module in its ``meta["owner"]``, a tensor to the module in its name.
        """
        rows: dict[str, list[int]] = {}
        elements = self.elements_by_tensor(sizes)
        for allocation, size in self.bytes_by_node(sizes).items():
            if allocation.op != "placeholder":
                rows.setdefault(_owner(allocation), [0] * 4)[3] += size
        for node, count in self.macs_by_node(sizes).items():
            rows.setdefault(_owner(node), [0] * 4)[0] += count
        for i, (name, count) in enumerate(elements.items()):
            row = rows.setdefault(name.rpartition(".")[0], [0] * 4)
            row[1] += count if self._parameters[i] else 0
            row[2] += count * int(self._item_bytes[i])
        return [LayerCost(name, *row) for name, row in rows.items()]


def _owner(node: fx.Node) -> str:
    return str(node.meta.get(OWNER) or "")


class _Reader:
    """Turn axes into polynomials; each axis object once."""

    def __init__(self, index: Mapping[Atom, int]) -> None:
        self.columns: dict[tuple[int, ...], int] = {}
        self._index = index
        self._axes: dict[int, tuple[Axis, Terms]] = {}
        self._products: dict[int, tuple[Any, Terms]] = {}

    def axis(self, axis: Axis) -> Terms:
        """Return the size of an axis."""
        known = self._axes.get(id(axis))
        if known is not None:
            return known[1]
        terms: Terms
        if isinstance(axis, Atom):
            position = self._index.get(axis)
            if axis.bound is not None:
                terms = self.axis(axis.bound)
            else:
                terms = {(): axis.size} if position is None else {(position,): 1}
        elif isinstance(axis, Product):
            terms = self._multiplied(axis.factors)
        else:
            assert isinstance(axis, Concat)
            terms = {}
            for part in axis.parts:
                for key, value in self.axis(part).items():
                    terms[key] = terms.get(key, 0) + value
        self._axes[id(axis)] = axis, terms  # holding the axis keeps its id from being given to another
        return terms

    def product(self, axes: tuple[Axis, ...]) -> Terms:
        """Return the product of the sizes of several axes."""
        known = self._products.get(id(axes))
        if known is None:
            known = self._products[id(axes)] = axes, self._multiplied(axes)
        return known[1]

    def bytes(self, value: Any, spec: Spec) -> Iterator[Terms]:
        """Yield the bytes of each tensor in what a node yields; without axes a tensor has the size it was seen with."""
        if isinstance(spec, tuple):
            parts = value if isinstance(value, list) and len(value) == len(spec) else [None] * len(spec)
            for part, each in zip(parts, spec, strict=True):
                yield from self.bytes(part, each)
        elif isinstance(spec, TensorSpec):
            if isinstance(value, tuple):
                yield multiply({(): spec.dtype.itemsize}, self.product(value))
            else:
                yield {(): spec.dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64))}

    def _multiplied(self, axes: Iterable[Axis]) -> Terms:
        scale = 1
        variable: list[Terms] = []
        for axis in axes:
            terms = self.axis(axis)
            if len(terms) == 1 and () in terms:
                scale *= terms[()]
            else:
                variable.append(terms)
        result: Terms = {(): scale}
        for terms in variable:
            result = multiply(result, terms)
        return result


class _Rows:
    """Collect the rows of a polynomial table."""

    def __init__(self, reader: _Reader) -> None:
        self._columns = reader.columns
        self._entries: list[tuple[int, int, int]] = []
        self._count = 0

    def add(self, *terms: Terms) -> None:
        """Append one row: the sum of ``terms``."""
        for polynomial in terms:
            for key, value in polynomial.items():
                self._entries.append((self._count, self._columns.setdefault(key, len(self._columns)), value))
        self._count += 1

    def table(self, monomials: Monomials) -> PolynomialTable:
        """Return the table, in the monomials that were collected along with it."""
        rows, columns, values = zip(*self._entries, strict=True) if self._entries else ((), (), ())
        return PolynomialTable(monomials, rows, columns, values, self._count)

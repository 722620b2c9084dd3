"""Find what sums over a group, and read it as columns of weights times taps of values.

What may live here: how what sums over an axis reads its inputs, in columns. Nothing here scores; which operators
multiply, and how, is said in ``dialects/products.py``.

An operator that multiplies its input with constants and sums over an axis (a linear layer, a convolution, a matrix
product with a parameter) is read as *columns*, one a position of the axis. Column p sees, in each row (a token, or a
place of a convolution's result), the values ``x_pk`` of its *taps*, of which there are as many as the kernel has
places, and adds ``Σ_k w_pok x_pk`` to output o. That holds with stride, dilation, groups and zero padding, whose zeros
are among the values. A transposed convolution is one over its input with zeros put in between, its kernel turned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from graphopt.axes.algebra import Atom, Axis, Product, leaves, product
from graphopt.axes.infer import Typing
from graphopt.dialects import products
from graphopt.dialects.products import Windows, attention_of, product_of

__all__ = ["Consumer", "Contraction", "consumer_of", "contraction_of"]

CHUNK = 1 << 22
"""How many taps are laid out at a time: 32 megabytes of float64."""


@dataclass(frozen=True)
class Consumer(ABC):
    """One operator that sums over an axis with constant weights.

    Attributes:
        source: The node whose values it reads.
        weight: The node of its constants.
        axis: The axis whose positions are its columns.
        summed: The atoms that it sums over; others of the axis pass through, as the groups of a convolution do.
    """

    source: fx.Node
    weight: fx.Node
    axis: Axis
    summed: frozenset[Atom]

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Lay out values as ``(rows, columns)``, each value once."""

    @abstractmethod
    def columns(self, weight: Tensor) -> Tensor:
        """Lay out the weight as ``(columns, outputs, taps)``."""

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        """Lay out values as ``(rows, columns, taps)``, in pieces: a value is there as often as a tap sees it."""
        yield self.rows(x).unsqueeze(-1)


@dataclass(frozen=True)
class Matrix(Consumer):
    """A matrix product ``scale · x (…, lead, n, k) @ w (lead, k, m)``; each matrix of a stack has its own columns.

    Attributes:
        lead: How many leading dimensions the weight has.
        x_turned: Whether the values come as ``(…, k, n)``.
        w_turned: Whether the weight comes as ``(…, m, k)``.
        scale: What the product is multiplied by.
    """

    lead: int
    x_turned: bool
    w_turned: bool
    scale: float = 1.0

    def rows(self, x: Tensor) -> Tensor:
        x = x.mT if self.x_turned else x
        if self.lead:
            x = x.movedim(-2, -2 - self.lead).flatten(-1 - self.lead)
        return x.reshape(-1, x.shape[-1])

    def columns(self, weight: Tensor) -> Tensor:
        weight = weight if self.scale == 1 else weight * self.scale
        if weight.dim() == 1:
            return weight[:, None, None]
        weight = weight.mT if self.w_turned else weight
        return weight.reshape(-1, weight.shape[-1]).unsqueeze(-1)


@dataclass(frozen=True)
class Convolution(Consumer):
    """A convolution of ``x (n, groups x c, …)`` with ``w (groups x o, c, …)``, or ``(groups x c, o, …)`` transposed."""

    groups: int
    windows: Windows

    def rows(self, x: Tensor) -> Tensor:
        channel = -1 - len(self.windows.kernel)
        return x.movedim(channel, -1).reshape(-1, x.shape[channel])

    def columns(self, weight: Tensor) -> Tensor:
        if self.windows.transposed:
            return weight.flip(tuple(range(2, weight.dim()))).flatten(2)
        grouped = weight.reshape(self.groups, -1, weight.shape[1], prod(self.windows.kernel))
        return grouped.transpose(1, 2).flatten(0, 1)

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        kernel = self.windows.kernel
        x = x if x.dim() == len(kernel) + 2 else x.unsqueeze(0)
        for images in x.split(self._images(x)):
            # (n, places …, c, taps …)
            yield self.windows.patches(images).reshape(-1, x.shape[1], prod(kernel))

    def _images(self, x: Tensor) -> int:
        """Return how many images' taps are laid out at a time."""
        pads = self.windows.pads(x.shape[2:])
        steps = self.windows.stride
        extents = (
            (n - 1) * step + 1 if self.windows.transposed else n for n, step in zip(x.shape[2:], steps, strict=True)
        )
        places = prod(n + before + after for n, (before, after) in zip(extents, pads, strict=True))
        places = places if self.windows.transposed else places // prod(steps)
        return max(1, CHUNK // max(1, x.shape[1] * places * prod(self.windows.kernel)))


@dataclass(frozen=True)
class Contraction:
    """One operator that sums products of two activations over an axis, as attention does over the query-key width.

    Attributes:
        query: The node of ``(…, l, columns)``, which stands where a consumer has its weight.
        key: The node of the values they meet.
        axis: The axis whose positions are its columns.
        in_softmax: Whether it is attention, so that a softmax over the keys follows.
        lay: Lays out the values of both, ``(…, l, columns)`` and ``(…, s, columns)``.
    """

    query: fx.Node
    key: fx.Node
    axis: Axis
    in_softmax: bool
    lay: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def summed(self) -> frozenset[Atom]:
        """The atoms that it sums over."""
        return _atoms(self.axis)


def consumer_of(node: fx.Node, typing: Typing, is_constant: Callable[[fx.Node], bool]) -> Consumer | None:
    """Return how a node reads its input in columns; None where it does not, or not with constants."""
    found = product_of(node)
    if found is None:
        return None
    if found.windows is not None:
        consumer: Consumer | None = _convolution(found, found.windows, typing)
    else:
        consumer = _matrix(found, typing, from_left=not found.is_linear and is_constant(found.left))
    if consumer is None or not is_constant(consumer.weight) or is_constant(consumer.source):
        return None
    return consumer


def contraction_of(node: fx.Node, typing: Typing, is_constant: Callable[[fx.Node], bool]) -> Contraction | None:
    """Return how a node multiplies two activations; None where it does not."""
    attention = attention_of(node)
    if attention is not None:
        axis = _width(typing.axes(attention.query)[-1], attention)
        if axis is None:
            return None
        found = Contraction(attention.query, attention.key, axis, True, attention.unpacked)
    else:
        multiplied = product_of(node)
        if multiplied is None or multiplied.is_linear:
            return None
        query, key = multiplied.left, multiplied.right
        if len(typing.axes(query)) < 2 or len(typing.axes(key)) < 2:
            return None
        first, second = multiplied.turned
        scale = multiplied.scale

        def lay(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return (q.mT if first else q) * scale, k if second else k.mT

        found = Contraction(query, key, typing.axes(query)[-2 if first else -1], False, lay)
    return None if is_constant(found.query) or is_constant(found.key) else found


def _width(axis: Axis, attention: products.Attention) -> Axis | None:
    """Return the axis of one head's width; None where heads and width are not told apart."""
    if attention.heads is None:
        return axis
    if isinstance(axis, Product) and axis.factors[-1].size == attention.width:
        return axis.factors[-1]
    return None


def _matrix(found: products.Product, typing: Typing, *, from_left: bool) -> Consumer | None:
    source, weight = (found.right, found.left) if from_left else (found.left, found.right)
    # A product with the weight on the left is that of both turned, with the weight on the right.
    x_turned, w_turned = (not found.turned[1], not found.turned[0]) if from_left else found.turned
    x, w = typing.axes(source), typing.axes(weight)
    x_turned, w_turned = x_turned and len(x) > 1, w_turned and len(w) > 1
    lead = max(0, len(w) - 2)
    if lead and (len(x) < len(w) or any(a.size != b.size for a, b in zip(x[-2 - lead : -2], w[:-2], strict=True))):
        return None
    inner = x[-2] if x_turned else x[-1]
    axis = product((*x[-2 - lead : -2], inner)) if lead else inner
    return Matrix(source, weight, axis, _atoms(inner), lead, x_turned, w_turned, found.scale)


def _convolution(found: products.Product, windows: Windows, typing: Typing) -> Consumer:
    axis = typing.axes(found.left)[-1 - len(windows.kernel)]
    # Groups pass through: what is summed over are the channels inside of each.
    inside = axis if windows.transposed else typing.axes(found.right)[1]
    summed = _atoms(inside) - (_atoms(typing.facts[found.node]) if windows.transposed else frozenset())
    return Convolution(found.left, found.right, axis, summed, found.groups, windows)


def _atoms(axis: Axis) -> frozenset[Atom]:
    return frozenset(leaves(axis))

"""Find what sums over a group, and read it as columns of weights times taps of values.

What may live here: how each operator that sums over an axis reads its inputs. Nothing here scores.

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
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from graphopt.axes.algebra import Atom, Axis, leaves, product
from graphopt.axes.infer import Typing
from graphopt.graph import Call

__all__ = ["Consumer", "Contraction", "consumer_of", "contraction_of"]

aten = torch.ops.aten

LINEAR = aten.linear.default
ATTENTION = aten.scaled_dot_product_attention.default
FACTORS: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.linalg_matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}
"""The arguments that a matrix product multiplies."""
CONVOLUTIONS = frozenset(
    getattr(packet, overload)
    for packet in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
    for overload in packet.overloads()
    if overload != "out"
)
TRANSPOSED_CONVOLUTIONS = frozenset(
    getattr(packet, overload)
    for packet in (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
    for overload in packet.overloads()
)

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
    """A matrix product ``x (…, lead, n, k) @ w (lead, k, m)``; each matrix of a stack has columns of its own.

    Attributes:
        lead: How many leading dimensions the weight has.
        x_turned: Whether the values come as ``(…, k, n)``.
        w_turned: Whether the weight comes as ``(…, m, k)``.
    """

    lead: int
    x_turned: bool
    w_turned: bool

    def rows(self, x: Tensor) -> Tensor:
        x = x.mT if self.x_turned else x
        if self.lead:
            x = x.movedim(-2, -2 - self.lead).flatten(-1 - self.lead)
        return x.reshape(-1, x.shape[-1])

    def columns(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return weight[:, None, None]
        weight = weight.mT if self.w_turned else weight
        return weight.reshape(-1, weight.shape[-1]).unsqueeze(-1)


@dataclass(frozen=True)
class Convolution(Consumer):
    """A convolution of ``x (n, groups x c, …)`` with ``w (groups x o, c, …)``.

    The numbers of stride, padding and dilation have one entry a spatial dimension; padding is (before, after).
    """

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def rows(self, x: Tensor) -> Tensor:
        channel = -1 - len(self.kernel)
        return x.movedim(channel, -1).reshape(-1, x.shape[channel])

    def columns(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, -1, weight.shape[1], prod(self.kernel))
        return grouped.transpose(1, 2).flatten(0, 1)

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        x = x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)
        yield from _windows(x, self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class TransposedConvolution(Consumer):
    """A transposed convolution of ``x (n, c, …)`` with ``w (c, o, …)``.

    The numbers are those of the convolution that it transposes; ``longer`` is what its result has beyond them.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    longer: tuple[int, ...]

    def rows(self, x: Tensor) -> Tensor:
        channel = -1 - len(self.kernel)
        return x.movedim(channel, -1).reshape(-1, x.shape[channel])

    def columns(self, weight: Tensor) -> Tensor:
        return weight.flip(tuple(range(2, weight.dim()))).flatten(2)

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        x = x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)
        spread = x.new_zeros(
            *x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], self.stride, strict=True))
        )
        spread[:, :, *(slice(None, None, step) for step in self.stride)] = x
        whole = [gap * (extent - 1) for extent, gap in zip(self.kernel, self.dilation, strict=True)]
        padding = tuple(
            (n - less, n - less + more) for n, less, more in zip(whole, self.padding, self.longer, strict=True)
        )
        yield from _windows(spread, self.kernel, (1,) * len(self.kernel), padding, self.dilation)


@dataclass(frozen=True)
class Contraction:
    """One operator that sums products of two activations over an axis, as attention does over the query-key width.

    Attributes:
        query: The node of ``(…, l, columns)``, which stands where a consumer has its weight.
        key: The node of the values they meet.
        axis: The axis whose positions are its columns.
        in_softmax: Whether it is attention, so that a softmax over the keys follows. Its keys come as
            ``(…, s, columns)``, those of a product written out as ``(…, columns, s)``.
    """

    query: fx.Node
    key: fx.Node
    axis: Axis
    in_softmax: bool

    @property
    def summed(self) -> frozenset[Atom]:
        """The atoms that it sums over."""
        return _atoms(self.axis)

    def keys(self, key: Tensor) -> Tensor:
        """Lay out the keys as ``(…, s, columns)``."""
        return key if self.in_softmax else key.mT


def consumer_of(node: fx.Node, typing: Typing, is_constant: Callable[[fx.Node], bool]) -> Consumer | None:
    """Return how a node reads its input in columns; None where it does not, or not with constants."""
    found: Consumer | None = None
    if node.target is LINEAR:
        found = _linear(Call(node), typing)
    elif node.target in FACTORS:
        found = _matrix_product(node, typing, is_constant)
    elif node.target in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS:
        found = _convolution(Call(node), typing)
    return found if found is not None and is_constant(found.weight) and not is_constant(found.source) else None


def contraction_of(node: fx.Node, typing: Typing, is_constant: Callable[[fx.Node], bool]) -> Contraction | None:
    """Return how a node multiplies two activations; None where it does not."""
    if node.target is ATTENTION:
        query, key = Call(node)["query"], Call(node)["key"]
    elif node.target in FACTORS:
        query, key = (Call(node)[name] for name in FACTORS[node.target])
    else:
        return None
    axes = typing.axes(query)
    if len(axes) < 2 or len(typing.axes(key)) < 2 or is_constant(query) or is_constant(key):
        return None
    return Contraction(query, key, axes[-1], node.target is ATTENTION)


def _linear(call: Call, typing: Typing) -> Consumer:
    axis = typing.axes(call["input"])[-1]
    turned = len(typing.axes(call["weight"])) == 2
    return Matrix(call["input"], call["weight"], axis, _atoms(axis), 0, False, turned)


def _matrix_product(node: fx.Node, typing: Typing, is_constant: Callable[[fx.Node], bool]) -> Consumer | None:
    first, second = (Call(node)[name] for name in FACTORS[node.target])
    turned = is_constant(first)
    source, weight = (second, first) if turned else (first, second)
    x, w = typing.axes(source), typing.axes(weight)
    lead = len(w) - 2
    if lead < 0 or len(x) < len(w) or any(a.size != b.size for a, b in zip(x[-2 - lead : -2], w[:-2], strict=True)):
        return None
    inner = x[-2] if turned else x[-1]
    axis = product((*x[-2 - lead : -2], inner))
    return Matrix(source, weight, axis, _atoms(inner), lead, turned, turned)


def _convolution(call: Call, typing: Typing) -> Consumer:
    weight = typing.axes(call["weight"])
    kernel = tuple(a.size for a in weight[2:])
    axis = typing.axes(call["input"])[-1 - len(kernel)]
    stride, dilation = _each(call["stride"], kernel), _each(call["dilation"], kernel)
    if call.node.target in TRANSPOSED_CONVOLUTIONS or (call.has("transposed") and call["transposed"]):
        # The groups pass through: what is summed over are the channels inside of each.
        summed = _atoms(axis) - _atoms(typing.facts[call.node])
        padding, longer = _each(call["padding"], kernel), _each(call["output_padding"], kernel)
        return TransposedConvolution(
            call["input"], call["weight"], axis, summed, kernel, stride, padding, dilation, longer
        )
    widths = _padding(call["padding"], kernel, dilation)
    summed = _atoms(weight[1])
    return Convolution(call["input"], call["weight"], axis, summed, call["groups"], kernel, stride, widths, dilation)


def _each(given: int | list[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Spell out a number a spatial dimension; one number, alone or in a list, holds for all."""
    numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _padding(
    given: str | int | list[int], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if given == "valid":
        return ((0, 0),) * len(kernel)
    if given == "same":
        whole = [spread * (extent - 1) for extent, spread in zip(kernel, dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in whole)
    assert not isinstance(given, str)
    return tuple((n, n) for n in _each(given, kernel))


def _atoms(axis: Axis) -> frozenset[Atom]:
    return frozenset(leaves(axis))


def _windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Iterator[Tensor]:
    """Lay out what each place of a convolution's result sees of ``x (n, c, …)``: ``(rows, c, taps)``, in pieces."""
    padded = F.pad(x, [n for widths in reversed(padding) for n in widths])
    images = max(1, CHUNK * len(x) * prod(stride) // max(1, padded.numel() * prod(kernel)))
    for windows in padded.split(images):
        for dim, (extent, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
            windows = windows.unfold(dim, gap * (extent - 1) + 1, step)[..., ::gap]
        # (n, c, places …, taps …) becomes (n, places …, c, taps …).
        yield windows.movedim(1, 1 + len(kernel)).reshape(-1, x.shape[1], prod(kernel))

"""The algebra of axes: what a dimension is made of, and when two dimensions must be the same.

What may live here: :class:`Atom`, :class:`Product`, :class:`Concat`, their unification, and the evaluation of a
solved expression (its size, its kept positions, the index that stands at each position). Nothing here knows tensors,
operators or frameworks.

An axis is a row of positions. It is one of

    Atom(n)            n indices that stand or fall one by one
    Product(a, b, …)   row-major flattening: position = (i_a * |b| + i_b) …
    Concat(a, b, …)    one after another

with ``ONE``, the empty product, for every axis of a single position. Unification refines atoms until both sides have
the same structure: an atom is bound to the other side, products are matched factor by factor and concatenations part
by part, splitting where boundaries differ. Two structures without a common refinement raise :class:`AxisError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import gcd, prod

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class AxisError(Exception):
    """Two axes have no common refinement. Inference answers it by freezing; users never meet it.

    Attributes:
        clash: The parts that could not be matched. Where they are frozen, all else is tied as it must be.
        factors: What :func:`split` would have returned, where only its clashing parts need to be frozen.
    """

    def __init__(self, message: str, clash: Sequence[Axis] = (), factors: tuple[Axis, Axis] | None = None) -> None:
        """Say what does not fit, and which parts of it."""
        super().__init__(message)
        self.clash = tuple(clash)
        self.factors = factors


@dataclass(frozen=True, slots=True)
class Reason:
    """Say why an atom cannot lose indices: a sentence, and the name of the node that demands it."""

    text: str
    node: str

    def __str__(self) -> str:
        return f"{self.text} (at {self.node})"


class Axis:
    """A dimension's structure; see the module's docstring."""

    __slots__ = ("size",)
    size: int


_serial = count()


class Atom(Axis):
    """``size`` indices that stand or fall one by one.

    ``bound`` is what unification found the atom to be; ``frozen`` the first reason why it must stay whole.
    """

    __slots__ = ("bound", "frozen", "serial")

    def __init__(self, size: int, frozen: Reason | None = None) -> None:
        """Make a new unbound atom, unequal to every other."""
        self.size = size
        self.bound: Axis | None = None
        self.frozen = frozen
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return (
            repr(self.bound) if self.bound is not None else f"{'!' if self.frozen else ''}a{self.serial}({self.size})"
        )


class Product(Axis):
    """A row-major flattening of several axes: ``heads x head_dim``."""

    __slots__ = ("factors",)

    def __init__(self, factors: tuple[Axis, ...]) -> None:
        """Flatten ``factors``, outermost first. Use :func:`product`, which simplifies."""
        self.factors = factors
        self.size = prod(f.size for f in factors)

    def __repr__(self) -> str:
        return "(" + " x ".join(map(repr, self.factors)) + ")"


class Concat(Axis):
    """Several axes one after another: ``q | k | v``."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Axis, ...]) -> None:
        """Chain ``parts``. Use :func:`concat`, which simplifies."""
        self.parts = parts
        self.size = sum(p.size for p in parts)

    def __repr__(self) -> str:
        return "(" + " | ".join(map(repr, self.parts)) + ")"


ONE = Product(())
_EMPTY = Concat(())


def atom(size: int, frozen: Reason | None = None) -> Axis:
    """Return a new atom, or ``ONE`` where there is a single position."""
    return ONE if size == 1 else Atom(size, frozen)


def product(factors: Sequence[Axis]) -> Axis:
    """Flatten ``factors`` row-major, without the trivial ones."""
    kept = tuple(f for f in factors if f.size != 1)
    return kept[0] if len(kept) == 1 else Product(kept) if kept else ONE


def concat(parts: Sequence[Axis]) -> Axis:
    """Chain ``parts``, without the empty ones."""
    kept = tuple(p for p in parts if p.size != 0)
    return kept[0] if len(kept) == 1 else Concat(kept)


def resolve(axis: Axis) -> Axis:
    """Follow bindings and flatten, down to unbound atoms: the normal form that matching works on."""
    if isinstance(axis, Atom):
        end = _last(axis)
        found = end if isinstance(end, Atom) else resolve(end)
        while isinstance(axis, Atom) and axis.bound is not None:
            axis.bound, axis = found, axis.bound
        return found
    if isinstance(axis, Product):
        factors = tuple(resolve(f) for f in axis.factors)
        if any(isinstance(f, Product) or f.size == 1 for f in factors):
            flat: list[Axis] = []
            for f in factors:
                flat.extend(f.factors if isinstance(f, Product) else (f,))
            return product(flat)
        return axis if all(f is g for f, g in zip(factors, axis.factors, strict=True)) else Product(factors)
    if isinstance(axis, Concat):
        parts = tuple(resolve(p) for p in axis.parts)
        if any(isinstance(p, Concat) for p in parts):
            chain: list[Axis] = []
            for p in parts:
                chain.extend(p.parts if isinstance(p, Concat) else (p,))
            return Concat(tuple(chain))
        return axis if all(p is q for p, q in zip(parts, axis.parts, strict=True)) else Concat(parts)
    raise TypeError(f"not an axis: {axis!r}")


def _last(axis: Axis) -> Axis:
    """Return what an atom is bound to in the end: a chain of atoms may be longer than the stack is deep."""
    while isinstance(axis, Atom) and axis.bound is not None:
        axis = axis.bound
    return axis


def leaves(axis: Axis) -> Iterator[Atom]:
    """Yield the unbound atoms of ``axis``, with repetitions, in order."""
    axis = _last(axis)
    if isinstance(axis, Atom):
        yield axis
    elif isinstance(axis, Product):
        for f in axis.factors:
            yield from leaves(f)
    elif isinstance(axis, Concat):
        for p in axis.parts:
            yield from leaves(p)


def paired(axis: Axis) -> set[Atom]:
    """Return the atoms that occur in two factors of one product, so that a position has two of their indices."""
    if isinstance(axis, Atom):
        return paired(axis.bound) if axis.bound is not None else set()
    if isinstance(axis, Concat):
        return set().union(*map(paired, axis.parts))
    assert isinstance(axis, Product)
    found: set[Atom] = set()
    seen: set[Atom] = set()
    for f in axis.factors:
        found |= paired(f)
        inside = set(leaves(f))
        found |= seen & inside
        seen |= inside
    return found


def multiplicity(axis: Axis, wanted: Atom) -> int:
    """Return how many indices of ``wanted`` a position of ``axis`` may have."""
    if isinstance(axis, Atom):
        return multiplicity(axis.bound, wanted) if axis.bound is not None else int(axis is wanted)
    if isinstance(axis, Concat):
        return max((multiplicity(p, wanted) for p in axis.parts), default=0)
    assert isinstance(axis, Product)
    return sum(multiplicity(f, wanted) for f in axis.factors)


def freeze(axis: Axis, reason: Reason) -> None:
    """Mark every atom of ``axis`` as one that must stay whole; the first reason stays."""
    for leaf in leaves(axis):
        if leaf.frozen is None:
            leaf.frozen = reason


def is_frozen(axis: Axis) -> bool:
    """Say whether no index of ``axis`` may go."""
    return all(leaf.frozen is not None for leaf in leaves(axis))


def unify(a: Axis, b: Axis) -> None:
    """Refine ``a`` and ``b`` to a common structure, in place.

    Raises:
        AxisError: the sizes differ, or no refinement is common to both. Everything but its ``clash`` is tied then.
    """
    clash: list[Axis] = []
    _unify(a, b, clash)
    if clash:
        raise AxisError(f"{a!r} and {b!r} have no common refinement", clash)


def _unify(a: Axis, b: Axis, clash: list[Axis]) -> None:
    """Match two axes; what cannot be matched is added to ``clash``, and matching goes on."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        raise AxisError(f"{a!r} has {a.size} positions, {b!r} has {b.size}", (a, b))
    try:
        if isinstance(a, Atom):
            _bind(a, b)
        elif isinstance(b, Atom):
            _bind(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            _unify_products(a, b, clash)
        elif isinstance(a, Concat) and isinstance(b, Concat):
            _unify_concats(a, b, clash)
        elif isinstance(a, Concat) and isinstance(b, Product):
            _unify_rows(a, b, clash)
        elif isinstance(a, Product) and isinstance(b, Concat):
            _unify_rows(b, a, clash)
    except AxisError:
        clash += (a, b)


def _bind(a: Atom, b: Axis) -> None:
    if a.frozen is not None:
        freeze(b, a.frozen)
    a.bound = b


def _unify_products(a: Product, b: Product, clash: list[Axis]) -> None:
    """Match factors from the left; a factor that spans several of the other side is split.

    Where neither of two factors divides the other, as in ``(6, 16)`` against ``(4, 24)``, what is to their right is
    matched from the right as far as it goes (both end in rows of 8), and the rest clashes.
    """
    left, right = list(reversed(a.factors)), list(reversed(b.factors))
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size > y.size and x.size % y.size == 0:
            outer, inner = split(x, y.size)
            left.append(inner)
            _unify(outer, y, clash)
        elif y.size > x.size and y.size % x.size == 0:
            outer, inner = split(y, x.size)
            right.append(inner)
            _unify(x, outer, clash)
        elif x.size == y.size:
            _unify(x, y, clash)
        else:
            clash += _unify_suffixes([x, *reversed(left)], [y, *reversed(right)], clash)
            return


def _unify_suffixes(left: list[Axis], right: list[Axis], clash: list[Axis]) -> list[Axis]:
    """Match factors from the right while they share a divisor; return those that are left over."""
    while left and right:
        x, y = resolve(left[-1]), resolve(right[-1])
        common = gcd(x.size, y.size)
        if common == 1:
            break
        x_outer, x_inner = split(x, x.size // common)
        y_outer, y_inner = split(y, y.size // common)
        _unify(x_inner, y_inner, clash)
        left[-1:] = [x_outer] if x_outer is not ONE else []
        right[-1:] = [y_outer] if y_outer is not ONE else []
    return left + right


def _unify_concats(a: Concat, b: Concat, clash: list[Axis]) -> None:
    """Match parts from the left; a part that spans several of the other side is cut."""
    left, right = list(reversed(a.parts)), list(reversed(b.parts))
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size > y.size:
            x, tail = cut(x, y.size)
            left.append(tail)
        elif y.size > x.size:
            y, tail = cut(y, x.size)
            right.append(tail)
        _unify(x, y, clash)


def _unify_rows(chain: Concat, grid: Product, clash: list[Axis]) -> None:
    """Match a concatenation with a product: whole rows of the grid at a time.

    A part of k rows is ``Product(k of the outer factor, inner)``; parts shorter than a row are gathered, or cut, until
    they fill one, and that row is matched with ``inner`` alone. So the rows share the inner factor's indices.
    """
    outer, inner = grid.factors[0], product(grid.factors[1:])
    width = inner.size
    pending = list(reversed(chain.parts))
    while pending:
        part = resolve(pending.pop())
        rows = part.size // width
        if rows == 0:
            row = [part]
            missing = width - part.size
            while missing:
                part = resolve(pending.pop())
                if part.size > missing:
                    part, rest = cut(part, missing)
                    pending.append(rest)
                row.append(part)
                missing -= part.size
            part, rows = concat(row), 1
        elif part.size % width:
            part, rest = cut(part, rows * width)
            pending.append(rest)
        if rows < outer.size:
            segment, outer = cut(outer, rows)
        else:
            segment = outer
        _unify(part, product((segment, inner)), clash)


def split(axis: Axis, outer_size: int) -> tuple[Axis, Axis]:
    """Refine ``axis`` to ``Product(outer, inner)`` with ``outer_size`` rows and return both factors.

    Raises:
        AxisError: ``outer_size`` does not divide the size, or the structure has no such rows; in the latter case with
            the factors that hold once its clash is frozen.
    """
    axis = resolve(axis)
    if outer_size == 1:
        return ONE, axis
    if outer_size == axis.size:
        return axis, ONE
    if axis.size % outer_size:
        raise AxisError(f"{axis!r} has no {outer_size} equal rows")
    if isinstance(axis, Product):
        rest = list(reversed(axis.factors))
        taken: list[Axis] = []
        missing = outer_size
        while missing > 1 and (missing % rest[-1].size == 0 or rest[-1].size % missing == 0):
            factor = rest.pop()
            if factor.size > missing:
                factor, inner = split(factor, missing)
                rest.append(inner)
            taken.append(factor)
            missing //= factor.size
        if missing == 1:
            return product(taken), product(rest[::-1])
    frozen = axis.frozen if isinstance(axis, Atom) else None
    factors = atom(outer_size, frozen), atom(axis.size // outer_size, frozen)
    try:
        unify(axis, product(factors))
    except AxisError as error:
        raise AxisError(f"{axis!r} has no {outer_size} equal rows", error.clash, factors) from error
    return factors


def cut(axis: Axis, position: int) -> tuple[Axis, Axis]:
    """Refine ``axis`` to ``Concat(head, tail)`` with ``position`` entries in the head and return both parts.

    A cut inside a row of a product sets that row apart: the rows before and after it stay rows, its two pieces are
    parts of the inner factor, and the row itself can no longer go.

    Raises:
        AxisError: ``position`` is not inside the axis, or a factor cannot be cut.
    """
    axis = resolve(axis)
    if not 0 < position < axis.size:
        raise AxisError(f"{axis!r} has no inner position {position}")
    if isinstance(axis, Atom):
        head, tail = atom(position, axis.frozen), atom(axis.size - position, axis.frozen)
        axis.bound = Concat((head, tail))
        return head, tail
    if isinstance(axis, Concat):
        head_parts: list[Axis] = []
        pending = list(reversed(axis.parts))
        missing = position
        while missing:
            part = pending.pop()
            if part.size > missing:
                part, rest = cut(part, missing)
                pending.append(rest)
            head_parts.append(part)
            missing -= part.size
        return concat(head_parts), concat(pending[::-1])
    assert isinstance(axis, Product)
    outer, inner = axis.factors[0], product(axis.factors[1:])
    rows, offset = divmod(position, inner.size)
    before, after = cut(outer, rows) if rows else (_EMPTY, outer)
    if not offset:
        return product((before, inner)), product((after, inner))
    after = cut(after, 1)[1] if after.size > 1 else _EMPTY
    left, right = cut(inner, offset)
    whole_before = [product((before, inner))] if rows else []
    whole_after = [product((after, inner))] if after.size else []
    return concat([*whole_before, left]), concat([right, *whole_after])


# -- evaluating a solved expression ---------------------------------------------------------------------------------


def size_of(axis: Axis, sizes: Mapping[Atom, int]) -> int:
    """Return the size of ``axis`` when the atoms have these sizes; an atom that is not named keeps its own."""
    return evaluate(axis, lambda leaf: sizes.get(leaf, leaf.size))


def evaluate(axis: Axis, value: Callable[[Atom], int]) -> int:
    """Evaluate ``axis`` as a polynomial: products multiply, concatenations add, ``value`` gives the atoms."""
    if isinstance(axis, Atom):
        return value(axis) if axis.bound is None else evaluate(axis.bound, value)
    if isinstance(axis, Product):
        return prod(evaluate(f, value) for f in axis.factors)
    assert isinstance(axis, Concat)
    return sum(evaluate(p, value) for p in axis.parts)


def kept_positions(axis: Axis, keep: Mapping[Atom, Indices]) -> Indices:
    """Return the positions of ``axis`` that stay, sorted, when the atoms keep these indices.

    An atom that is not named keeps all of its indices.
    """
    if isinstance(axis, Atom):
        if axis.bound is not None:
            return kept_positions(axis.bound, keep)
        kept = keep.get(axis)
        return np.arange(axis.size, dtype=np.int64) if kept is None else kept
    if isinstance(axis, Product):
        found = np.zeros(1, dtype=np.int64)
        for f in axis.factors:
            found = (found[:, None] * f.size + kept_positions(f, keep)[None, :]).reshape(-1)
        return found
    assert isinstance(axis, Concat)
    offsets = np.cumsum([0, *(p.size for p in axis.parts)])
    return np.concatenate([o + kept_positions(p, keep) for o, p in zip(offsets, axis.parts, strict=False)])


def index_at(axis: Axis, wanted: Atom) -> Indices:
    """Return, for each position of ``axis``, which index of ``wanted`` it belongs to; -1 where to none.

    Where the atom occurs twice in one product (an index paired with itself) the first occurrence counts; inference
    freezes the atoms of such axes (see :func:`paired`).
    """
    if isinstance(axis, Atom):
        if axis.bound is not None:
            return index_at(axis.bound, wanted)
        return np.arange(axis.size, dtype=np.int64) if axis is wanted else np.full(axis.size, -1, dtype=np.int64)
    if isinstance(axis, Product):
        found = np.full(1, -1, dtype=np.int64)
        for f in axis.factors:
            inner = index_at(f, wanted)
            found = np.where(found[:, None] >= 0, found[:, None], inner[None, :]).reshape(-1)
        return found
    assert isinstance(axis, Concat)
    return np.concatenate([index_at(p, wanted) for p in axis.parts])

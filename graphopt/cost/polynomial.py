"""Hold polynomials in the sizes of atoms, and evaluate them and what one index more or less costs.

What may live here: monomials, polynomials that share them, tables of polynomials, and the maximum of several. Nothing
here knows nodes, tensors or budgets: a variable is a position in a vector of sizes.

Every quantity of one model is written in the same monomials, so their values are computed once for a vector of sizes
and each quantity is a dot product. All coefficients are non-negative, hence every quantity grows with every size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

__all__ = ["Monomials", "Peak", "Polynomial", "PolynomialTable", "Terms", "multiply"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

Terms = dict[tuple[int, ...], int]
"""A polynomial as it is being built: {variables of a monomial, ascending, a power p as p repetitions: coefficient}."""


def _summed(labels: Integers, amounts: Floats, count: int) -> Floats:
    """Add up the amounts of each label; 0 where there is none."""
    return np.bincount(labels, amounts, count).astype(np.float64, copy=False)


def multiply(left: Terms, right: Terms) -> Terms:
    """Return the product of two polynomials, like monomials merged."""
    if len(left) == 1 and () in left:
        scale = left[()]
        return right if scale == 1 else {key: scale * value for key, value in right.items()}
    if len(right) == 1 and () in right:
        return multiply(right, left)
    product: Terms = {}
    for a, x in left.items():
        for b, y in right.items():
            key = tuple(sorted(a + b)) if a and b else a or b
            product[key] = product.get(key, 0) + x * y
    return product


class Monomials:
    """The monomials that the quantities of one model are written in.

    Args:
        keys: the variables of each monomial, ascending, a power p as p repetitions.
        variable_count: how many variables there are.

    ``factors`` is ``keys`` as an array ``(monomials, highest degree)``, padded with ``variable_count``, the position
    of a constant 1. ``member``, ``variable`` and ``power`` list every pair of a monomial and a variable in it.
    """

    __slots__ = ("factors", "member", "power", "variable", "variable_count")

    def __init__(self, keys: Sequence[tuple[int, ...]], variable_count: int) -> None:
        self.variable_count = variable_count
        degree = max(map(len, keys), default=0)
        padding = (variable_count,) * degree
        rows = [key + padding[len(key) :] for key in keys]
        self.factors: Integers = np.array(rows, dtype=np.int64).reshape(len(keys), degree)
        pairs = [(m, v, len(list(same))) for m, key in enumerate(keys) for v, same in groupby(key)]
        table = np.array(pairs, dtype=np.int64).reshape(len(pairs), 3)
        self.member, self.variable, self.power = (np.ascontiguousarray(column) for column in table.T)

    def __len__(self) -> int:
        return len(self.factors)

    def values(self, sizes: npt.ArrayLike) -> Floats:
        """Evaluate every monomial; ``sizes`` has one entry a variable."""
        extended = np.ones(self.variable_count + 1)
        extended[:-1] = sizes
        values = np.ones(len(self.factors))
        for column in self.factors.T:
            values *= extended[column]
        return values

    def changes(self, amounts: Floats, sizes: npt.ArrayLike, steps: npt.ArrayLike) -> Floats:
        """Return, for each variable, how much a sum of monomials changes when that variable alone takes its step.

        Args:
            amounts: value of each monomial times its coefficient, at ``sizes``.
            sizes: the sizes, all at least 1.
            steps: what is added to each size, positive or negative; one entry a variable, or one for all.

        Returns:
            The exact differences, one a variable: ``f(sizes + step_i e_i) - f(sizes)``.
        """
        ratio = np.broadcast_to(np.asarray(steps, dtype=np.float64), (self.variable_count,)) / np.asarray(sizes)
        relative = ratio[self.variable]
        powered = self.power > 1
        if powered.any():
            relative = relative.copy()
            relative[powered] = (1 + relative[powered]) ** self.power[powered] - 1
        return _summed(self.variable, amounts[self.member] * relative, self.variable_count)

    def gradient(self, amounts: Floats, sizes: npt.ArrayLike) -> Floats:
        """Return the partial derivatives of a sum of monomials; arguments as in :meth:`changes`."""
        slopes = _summed(self.variable, amounts[self.member] * self.power, self.variable_count)
        return slopes / np.asarray(sizes, dtype=np.float64)


class Polynomial:
    """A sum of monomials, each with its coefficient.

    Example:
        >>> area = Polynomial.of({(0, 1): 1}, 2)
        >>> area([3, 4]), area.changes([3, 4], -1)
        (12.0, array([-4., -3.]))
    """

    __slots__ = ("coefficients", "monomials")

    def __init__(self, monomials: Monomials, coefficients: Floats) -> None:
        self.monomials = monomials
        self.coefficients = coefficients

    @classmethod
    def of(cls, terms: Mapping[tuple[int, ...], float], variable_count: int) -> Polynomial:
        """Make a polynomial of its terms, over monomials of its own."""
        keys: dict[tuple[int, ...], float] = {}
        for key, value in terms.items():
            ordered = tuple(sorted(key))
            keys[ordered] = keys.get(ordered, 0.0) + value
        return cls(Monomials(list(keys), variable_count), np.array(list(keys.values()), dtype=np.float64))

    def __call__(self, sizes: npt.ArrayLike) -> float:
        """Evaluate at these sizes."""
        return float(self.monomials.values(sizes) @ self.coefficients)

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial(self.monomials, self.coefficients + other.coefficients)

    def __mul__(self, scale: float) -> Polynomial:
        return Polynomial(self.monomials, self.coefficients * scale)

    def changes(self, sizes: npt.ArrayLike, steps: npt.ArrayLike) -> Floats:
        """Return how much the value changes when each variable alone takes its step; exact."""
        return self.monomials.changes(self.monomials.values(sizes) * self.coefficients, sizes, steps)

    def gradient(self, sizes: npt.ArrayLike) -> Floats:
        """Return the partial derivatives."""
        return self.monomials.gradient(self.monomials.values(sizes) * self.coefficients, sizes)

    def terms(self) -> dict[tuple[int, ...], float]:
        """Return the terms with a coefficient other than zero, in the form :meth:`of` takes."""
        one = self.monomials.variable_count
        return {
            tuple(int(v) for v in self.monomials.factors[m] if v != one): float(self.coefficients[m])
            for m in np.flatnonzero(self.coefficients)
        }


class PolynomialTable:
    """Many polynomials in the same monomials, a row each, stored sparsely.

    Args:
        monomials: the shared monomials.
        rows: row of each stored coefficient.
        columns: monomial of each stored coefficient.
        coefficients: the coefficients; several of the same row and column add up.
        row_count: how many polynomials there are.
    """

    __slots__ = ("coefficients", "columns", "monomials", "row_count", "rows")

    def __init__(
        self,
        monomials: Monomials,
        rows: Iterable[int],
        columns: Iterable[int],
        coefficients: Iterable[float],
        row_count: int,
    ) -> None:
        self.monomials = monomials
        self.rows: Integers = np.fromiter(rows, dtype=np.int64)
        self.columns: Integers = np.fromiter(columns, dtype=np.int64)
        self.coefficients: Floats = np.fromiter(coefficients, dtype=np.float64)
        self.row_count = row_count

    def __call__(self, sizes: npt.ArrayLike) -> Floats:
        """Evaluate every polynomial at these sizes."""
        amounts = self.monomials.values(sizes)[self.columns] * self.coefficients
        return _summed(self.rows, amounts, self.row_count)

    def combined(self, weights: Floats | None = None) -> Polynomial:
        """Return the sum of the polynomials, each times its weight (1 without weights)."""
        amounts = self.coefficients if weights is None else self.coefficients * weights[self.rows]
        return Polynomial(self.monomials, _summed(self.columns, amounts, len(self.monomials)))

    def row(self, index: int) -> Polynomial:
        """Return one of the polynomials."""
        chosen = self.rows == index
        coefficients = _summed(self.columns[chosen], self.coefficients[chosen], len(self.monomials))
        return Polynomial(self.monomials, coefficients)


class Peak:
    """The largest sum of polynomials that hold at the same time, plus a polynomial that always holds.

    Row ``i`` of the table holds at the steps ``first[i]`` to ``last[i]``, both included. The value is the maximum over
    the steps of ``base`` plus the rows that hold: a maximum of polynomials.
    """

    __slots__ = ("base", "first", "last", "step_count", "table")

    sharpness = 200.0
    """How steeply a step loses weight in :meth:`gradient` as it falls below the peak: by ``exp(-200)`` at zero."""

    def __init__(
        self, table: PolynomialTable, first: npt.ArrayLike, last: npt.ArrayLike, base: Polynomial | None = None
    ) -> None:
        self.table = table
        self.first: Integers = np.array(first, dtype=np.int64)
        self.last: Integers = np.array(last, dtype=np.int64)
        self.step_count = int(self.last.max()) + 1 if len(self.last) else 1
        self.base = base

    def by_step(self, sizes: npt.ArrayLike) -> Floats:
        """Return the sum of what holds at each step, without the base."""
        amounts = self.table(sizes)
        begun = _summed(self.first, amounts, self.step_count + 1)
        ended = _summed(self.last + 1, amounts, self.step_count + 1)
        return np.cumsum(begun - ended)[: self.step_count]

    def __call__(self, sizes: npt.ArrayLike) -> float:
        """Evaluate at these sizes."""
        return float(self.by_step(sizes).max()) + (self.base(sizes) if self.base is not None else 0.0)

    def gradient(self, sizes: npt.ArrayLike) -> Floats:
        """Return the mean of the steps' partial derivatives, weighted towards the steps near the peak.

        At a peak that stands alone this is the derivative of the maximum. Where several steps are about as high, each
        of them has a share, so that lowering along it lowers all of them and not one in turn.
        """
        steps = self.by_step(sizes)
        highest = max(float(steps.max()), 1e-300)
        weights = np.exp((steps / highest - 1) * self.sharpness)
        until = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        live = self.table.combined(until[self.last + 1] - until[self.first])
        return (live if self.base is None else live + self.base).gradient(sizes)

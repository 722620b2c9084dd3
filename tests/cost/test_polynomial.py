"""Polynomials against sums written out."""

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost import Peak, Polynomial
from graphopt.cost.polynomial import Monomials, PolynomialTable, Terms, multiply

VARIABLES = 4

monomials = st.lists(st.integers(0, VARIABLES - 1), max_size=4).map(lambda v: tuple(sorted(v)))
terms = st.dictionaries(monomials, st.integers(1, 50), max_size=6)
sizes = st.lists(st.integers(1, 40), min_size=VARIABLES, max_size=VARIABLES)


def written_out(polynomial: Terms, at: Sequence[float]) -> float:
    return float(sum(c * prod(at[v] for v in key) for key, c in polynomial.items()))


@given(terms, sizes)
def test_value_is_the_sum_of_products(polynomial: Terms, at: list[int]) -> None:
    assert Polynomial.of(polynomial, VARIABLES)(at) == written_out(polynomial, at)


@given(terms, terms, sizes)
def test_product_of_polynomials_is_the_product_of_values(left: Terms, right: Terms, at: list[int]) -> None:
    assert written_out(multiply(left, right), at) == written_out(left, at) * written_out(right, at)


@given(terms, sizes, st.lists(st.integers(-1, 3), min_size=VARIABLES, max_size=VARIABLES))
def test_changes_are_exact_differences(polynomial: Terms, at: list[int], steps: list[int]) -> None:
    expected = []
    for v, step in enumerate(steps):
        moved = [s + step * (i == v) for i, s in enumerate(at)]
        expected.append(written_out(polynomial, moved) - written_out(polynomial, at))
    found = Polynomial.of(polynomial, VARIABLES).changes(at, steps)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)


@given(terms, sizes)
def test_gradient_is_the_derivative(polynomial: Terms, at: list[int]) -> None:
    expected = []
    for v in range(VARIABLES):
        # c x^p differentiates to p c x^(p-1), everything else being a factor.
        expected.append(
            sum(c * key.count(v) * prod(at[u] for u in key) / at[v] for key, c in polynomial.items() if v in key)
        )
    assert Polynomial.of(polynomial, VARIABLES).gradient(at) == pytest.approx(expected, rel=1e-12)


@given(terms)
def test_terms_are_given_back(polynomial: Terms) -> None:
    assert Polynomial.of(polynomial, VARIABLES).terms() == polynomial


def test_terms_in_any_order_are_one_monomial() -> None:
    assert Polynomial.of({(1, 0): 2, (0, 1): 3}, 2).terms() == {(0, 1): 5.0}


def test_empty_polynomial_is_zero() -> None:
    nothing = Polynomial.of({}, 2)
    assert nothing([3, 4]) == 0
    assert nothing.changes([3, 4], -1).tolist() == [0, 0]


def table() -> PolynomialTable:
    # rows: 2 s0, s0 s1, 7
    return PolynomialTable(Monomials([(0,), (0, 1), ()], 2), [0, 1, 2], [0, 1, 2], [2, 1, 7], 3)


def test_table_evaluates_and_combines_its_rows() -> None:
    rows = table()
    assert rows([3, 5]).tolist() == [6, 15, 7]
    assert rows.combined()([3, 5]) == 28
    assert rows.combined(np.array([1.0, 0.0, 2.0]))([3, 5]) == 20
    assert rows.row(1).terms() == {(0, 1): 1.0}


@given(
    st.lists(st.tuples(terms, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
    sizes,
)
def test_peak_is_the_highest_sum_of_what_is_live(rows: list[tuple[Terms, int, int]], at: list[int]) -> None:
    keys = list({key for polynomial, _, _ in rows for key in polynomial})
    cells = [(r, keys.index(k), c) for r, (polynomial, _, _) in enumerate(rows) for k, c in polynomial.items()]
    peak = Peak(
        PolynomialTable(
            Monomials(keys, VARIABLES), [c[0] for c in cells], [c[1] for c in cells], [c[2] for c in cells], len(rows)
        ),
        [min(a, b) for _, a, b in rows],
        [max(a, b) for _, a, b in rows],
        Polynomial.of({(0,): 3}, VARIABLES),
    )
    by_step = [sum(written_out(p, at) for p, a, b in rows if min(a, b) <= t <= max(a, b)) for t in range(6)]
    assert peak(at) == pytest.approx(max(by_step) + 3 * at[0])


def test_gradient_of_a_peak_that_stands_alone_is_that_of_its_step() -> None:
    peak = Peak(table(), [0, 2, 0], [1, 3, 3], Polynomial(table().monomials, np.array([1.0, 0.0, 0.0])))
    # steps 0 and 1 hold 2 s0 + 7, steps 2 and 3 hold s0 s1 + 7
    assert peak([3, 5]) == 15 + 7 + 3
    assert peak.gradient([3, 5]) == pytest.approx([5 + 1, 3])


def test_gradient_of_equal_peaks_lowers_both() -> None:
    rows = PolynomialTable(Monomials([(0,), (1,)], 2), [0, 1], [0, 1], [1, 1], 2)
    peak = Peak(rows, [0, 1], [0, 1])
    assert peak.gradient([10, 10]) == pytest.approx([0.5, 0.5])


def test_all_pairs_of_powers_change_exactly() -> None:
    for p, q in product(range(4), range(4)):
        polynomial = Polynomial.of({(0,) * p + (1,) * q: 1.0}, 2)
        removed = polynomial.changes([5, 7], -1)
        assert removed == pytest.approx([4**p * 7**q - 5**p * 7**q, 5**p * 6**q - 5**p * 7**q])

"""The algebra: what unification must keep true, on chosen and on random axes."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphopt.axes.algebra import (
    ONE,
    Atom,
    Axis,
    AxisError,
    Reason,
    atom,
    concat,
    cut,
    freeze,
    index_at,
    is_frozen,
    kept_positions,
    leaves,
    product,
    resolve,
    size_of,
    split,
    unify,
)

WHY = Reason("a test says so", "node")


def _keep(axis: Axis, seed: int) -> dict[Atom, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        leaf: np.sort(rng.permutation(leaf.size)[: rng.integers(1, leaf.size + 1)])
        for leaf in dict.fromkeys(leaves(axis))
        if leaf.frozen is None
    }


def test_single_positions_are_trivial() -> None:
    assert atom(1) is ONE
    assert product([ONE, ONE]) is ONE
    a = atom(4)
    assert product([ONE, a]) is a
    assert concat([a]) is a


def test_binding_an_atom_takes_the_other_structure() -> None:
    a, heads, dim = atom(12), atom(3), atom(4)
    unify(a, product([heads, dim]))
    assert list(leaves(a)) == [heads, dim]


def test_products_are_matched_factor_by_factor() -> None:
    heads, dim, rows, inner = atom(6), atom(4), atom(2), atom(12)
    unify(product([heads, dim]), product([rows, inner]))
    resolved = resolve(inner)
    assert [leaf.size for leaf in leaves(resolved)] == [3, 4]
    assert list(leaves(resolved))[1:] == list(leaves(dim))
    assert [leaf.size for leaf in leaves(heads)] == [2, 3]


def test_products_without_a_common_refinement_are_refused() -> None:
    a, b = product([atom(2), atom(5)]), product([atom(5), atom(2)])
    with pytest.raises(AxisError, match="no common refinement") as caught:
        unify(a, b)
    assert {leaf for axis in caught.value.clash for leaf in leaves(axis)} == {*leaves(a), *leaves(b)}


def test_rows_that_do_not_fit_still_share_what_is_inside() -> None:
    """Group norms of 6 and of 4 groups over one axis: rows of 8 are common, the rest clashes."""
    a, b = product([atom(6), atom(16)]), product([atom(4), atom(24)])
    with pytest.raises(AxisError) as caught:
        unify(a, b)
    for axis in caught.value.clash:
        freeze(axis, WHY)
    free = [{leaf for leaf in leaves(axis) if leaf.frozen is None} for axis in (a, b)]
    assert free[0] == free[1]
    assert [leaf.size for leaf in free[0]] == [8]


def test_sizes_must_agree() -> None:
    with pytest.raises(AxisError, match=r"5 positions.*6"):
        unify(atom(5), atom(6))


def test_concatenations_are_cut_where_boundaries_differ() -> None:
    q, k, v = atom(4), atom(2), atom(2)
    head, tail = atom(6), atom(2)
    unify(concat([q, k, v]), concat([head, tail]))
    assert list(leaves(head)) == [*leaves(q), *leaves(k)]
    assert list(leaves(tail)) == list(leaves(v))


def test_concatenated_halves_that_meet_a_grid_share_their_indices() -> None:
    """Channel shuffle: ``a | b`` viewed as two rows ties a with b."""
    a, b = atom(5), atom(5)
    unify(concat([a, b]), product([atom(2), inner := atom(5)]))
    assert list(leaves(a)) == list(leaves(b)) == list(leaves(inner))


def test_parts_of_several_rows_become_products() -> None:
    """Grouped-query packing: 4 query heads and 2 key heads of one width."""
    q, k = atom(12), atom(6)
    unify(concat([q, k]), product([atom(6), width := atom(3)]))
    assert [leaf.size for leaf in leaves(q)] == [4, 3]
    assert list(leaves(q))[1] is list(leaves(k))[1] is next(iter(leaves(width)))


def test_parts_shorter_than_a_row_share_the_row() -> None:
    a, b, c, d = atom(2), atom(3), atom(2), atom(3)
    unify(concat([a, b, c, d]), product([atom(2), inner := atom(5)]))
    assert list(leaves(a)) == list(leaves(c))
    assert list(leaves(b)) == list(leaves(d))
    assert [leaf.size for leaf in leaves(inner)] == [2, 3]


def test_freezing_spreads_through_bindings() -> None:
    a, heads, dim = atom(12), atom(3), atom(4)
    freeze(a, WHY)
    unify(a, product([heads, dim]))
    assert is_frozen(heads)
    assert is_frozen(dim)
    late, partner = atom(4), atom(4)
    unify(late, partner)
    freeze(late, WHY)
    assert is_frozen(partner)


def test_the_first_reason_stays() -> None:
    a = Atom(3)
    freeze(a, WHY)
    freeze(a, Reason("another", "later"))
    assert a.frozen is WHY


def test_split_refuses_what_structure_forbids() -> None:
    axis = product([atom(4), atom(6)])
    with pytest.raises(AxisError, match="5 equal rows"):
        split(axis, 5)
    with pytest.raises(AxisError, match="3 equal rows") as caught:
        split(axis, 3)
    assert caught.value.factors is not None
    assert [factor.size for factor in caught.value.factors] == [3, 8]


def test_a_cut_between_rows_keeps_rows() -> None:
    axis = product([atom(4), atom(6)])
    head, tail = cut(axis, 12)
    assert [leaf.size for leaf in leaves(head)] == [leaf.size for leaf in leaves(tail)] == [2, 6]


def test_a_cut_inside_a_row_sets_the_row_apart() -> None:
    rows, columns = atom(5), atom(2)
    axis = product([rows, columns])
    head, tail = cut(axis, 5)
    assert (head.size, tail.size) == (5, 5)
    assert [leaf.size for leaf in leaves(rows)] == [2, 2]
    keep = {leaf: np.array([0]) for leaf in leaves(rows)}
    assert kept_positions(axis, keep).tolist() == [0, 1, 4, 5, 6, 7]
    assert kept_positions(head, keep).tolist() == [0, 1, 4]


def test_index_at_names_the_index_of_every_position() -> None:
    heads, dim, other = Atom(2), Atom(3), Atom(2)
    axis = concat([product([heads, dim]), other])
    assert index_at(axis, heads).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert index_at(axis, dim).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]


@st.composite
def axes(draw: st.DrawFn, size: int, depth: int = 2) -> Axis:
    """Draw an axis of a given size."""
    if depth == 0 or size < 4 or draw(st.booleans()):
        return atom(size)
    divisors = [d for d in range(2, size) if size % d == 0]
    in_rows = draw(st.booleans())
    if divisors and in_rows:
        outer = draw(st.sampled_from(divisors))
        return product([draw(axes(outer, depth - 1)), draw(axes(size // outer, depth - 1))])
    head = draw(st.integers(1, size - 1))
    return concat([draw(axes(head, depth - 1)), draw(axes(size - head, depth - 1))])


@given(st.data())
def test_unified_axes_keep_the_same_positions(data: st.DataObject) -> None:
    """The law: whatever the atoms keep, both sides keep the same positions."""
    size = data.draw(st.sampled_from([4, 6, 8, 12, 24, 36]))
    a, b = data.draw(axes(size)), data.draw(axes(size))
    try:
        unify(a, b)
    except AxisError as error:
        for axis in error.clash:
            freeze(axis, WHY)
    keep = _keep(concat([a, b]), data.draw(st.integers(0, 1000)))
    assert kept_positions(a, keep).tolist() == kept_positions(b, keep).tolist()
    assert len(kept_positions(a, keep)) == size_of(a, {leaf: len(k) for leaf, k in keep.items()})


@given(st.data())
def test_resolving_changes_nothing_but_the_form(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([6, 12, 24]))
    a, b = data.draw(axes(size, 3)), data.draw(axes(size, 3))
    try:
        unify(a, b)
    except AxisError:
        assume(False)
    keep = _keep(a, 0)
    assert kept_positions(resolve(a), keep).tolist() == kept_positions(a, keep).tolist()
    assert resolve(resolve(a)).size == size == prod([resolve(a).size])


@given(st.data())
def test_every_kept_position_belongs_to_kept_indices_only(data: st.DataObject) -> None:
    axis = data.draw(axes(24, 3))
    keep = _keep(axis, data.draw(st.integers(0, 100)))
    kept = set(kept_positions(axis, keep).tolist())
    alive = np.ones(24, dtype=bool)
    for leaf in dict.fromkeys(leaves(axis)):
        index = index_at(axis, leaf)
        alive &= (index < 0) | np.isin(index, keep[leaf])
    assert kept == set(np.flatnonzero(alive).tolist())


def test_chains_of_atoms_may_be_longer_than_the_stack_is_deep() -> None:
    chain = [Atom(4) for _ in range(5000)]
    for each, following in itertools.pairwise(chain):
        each.bound = following
    assert list(leaves(chain[0])) == [chain[-1]]
    assert resolve(chain[0]) is chain[-1]
    assert all(each.bound is chain[-1] for each in chain[:-1])

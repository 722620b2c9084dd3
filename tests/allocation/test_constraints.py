"""Which sizes groups may take."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.allocation import Constraints
from graphopt.allocation.constraints import Limits
from graphopt.axes.algebra import Axis, Concat, Product, Reason, atom
from graphopt.axes.groups import Group
from graphopt.errors import PipelineError
from tests.cost.handmade import typing_of


def frozen(size: int) -> Axis:
    return atom(size, Reason("fixed", "test"))


def groups_of(**shapes: tuple[Axis, ...]) -> list[Group]:
    """Make the groups of parameters; `__` in a name stands for a dot."""
    tensors = {
        name.replace("__", "."): (nn.Parameter(torch.empty([a.size for a in axes])), axes)
        for name, axes in shapes.items()
    }
    return typing_of(tensors).groups


def two_layers() -> list[Group]:
    hidden, out = atom(40), atom(10)
    return groups_of(
        up__weight=(hidden, frozen(3)),
        up__bias=(hidden,),
        block__down__weight=(out, hidden),
        head__weight=(frozen(5), out),
    )


def bounds(constraints: Constraints, groups: list[Group]) -> list[tuple[int, int, int]]:
    limits = constraints.limits(groups)
    return [(int(a), int(b), int(c)) for a, b, c in zip(limits.lower, limits.upper, limits.step, strict=True)]


def test_a_share_of_every_group_stays_and_one_index_at_least() -> None:
    assert bounds(Constraints(), two_layers()) == [(4, 40, 1), (1, 10, 1)]
    assert bounds(Constraints(min_keep=0), two_layers()) == [(1, 40, 1), (1, 10, 1)]
    assert bounds(Constraints(min_keep=1), two_layers()) == [(40, 40, 1), (10, 10, 1)]


def test_a_share_is_not_rounded_up_by_round_off() -> None:
    (group,) = groups_of(w=(atom(30),))
    assert bounds(Constraints(min_keep=0.1), [group]) == [(3, 30, 1)]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("up.weight", [0]),
        ("up", [0]),
        ("up.*", [0]),
        ("block", [0, 1]),
        ("block.down", [0, 1]),
        ("*.down.weight", [0, 1]),
        ("head.weight[1]", [1]),
        ("block.down.weight[1]", [0]),
        ("*", [0, 1]),
    ],
)
def test_patterns_match_tensors_modules_and_dimensions(pattern: str, matching: list[int]) -> None:
    groups = two_layers()
    excluded = Constraints(exclude=[pattern]).limits(groups)
    assert [i for i, g in enumerate(groups) if excluded.lower[i] == g.size] == matching
    included = Constraints(include=[pattern]).limits(groups)
    assert [i for i, g in enumerate(groups) if included.lower[i] < g.size] == matching


def test_further_names_of_a_tensor_match_too() -> None:
    (group,) = groups_of(embed__weight=(atom(8), frozen(4)))
    limits = Constraints(exclude=["lm_head"]).limits([group], {"embed.weight": ["embed.weight", "lm_head.weight"]})
    assert limits.lower[0] == 8


def test_own_bounds_take_the_place_of_the_floor() -> None:
    groups = two_layers()
    assert bounds(Constraints(bounds={"up": (0.5, 0.75)}), groups) == [(20, 30, 1), (1, 10, 1)]
    assert bounds(Constraints(bounds={"up": (2, 6)}), groups) == [(2, 6, 1), (1, 10, 1)]
    assert bounds(Constraints(bounds={"block": (0, 1), "up": (0.5, 1)}), groups) == [(20, 40, 1), (1, 10, 1)]
    assert bounds(Constraints(bounds={"up": (0, 0.01)}), groups)[0] == (1, 1, 1)


def test_sizes_are_multiples_where_a_group_is_larger_than_one() -> None:
    small, equal, odd, large = atom(6), atom(8), atom(58), atom(64)
    groups = groups_of(a=(small,), b=(equal,), c=(odd,), d=(large,))
    assert bounds(Constraints(channel_multiple=8), groups) == [(1, 6, 1), (1, 8, 1), (8, 58, 8), (8, 64, 8)]


def test_one_factor_of_a_dimension_carries_the_multiple() -> None:
    heads, dim = atom(12), atom(64)
    groups = groups_of(proj__weight=(frozen(5), Product((heads, dim))), table=(frozen(3), heads))
    assert bounds(Constraints(channel_multiple=8), groups) == [(2, 12, 1), (8, 64, 8)]


def test_what_is_fixed_in_a_dimension_counts_towards_the_multiple() -> None:
    heads = atom(12)
    groups = groups_of(proj__weight=(Product((heads, frozen(4))),))
    assert bounds(Constraints(channel_multiple=8), groups) == [(2, 12, 2)]
    wide = atom(12)
    assert bounds(Constraints(channel_multiple=8), groups_of(w=(Product((wide, frozen(16))),))) == [(2, 12, 1)]


def test_the_larger_factor_of_a_grouped_convolution_is_stepped() -> None:
    outer, inner = atom(32), atom(4)
    groups = groups_of(conv__weight=(Product((outer, inner)), frozen(3)))
    assert bounds(Constraints(channel_multiple=8), groups) == [(8, 32, 8), (1, 4, 1)]


def test_parts_of_a_concatenation_are_multiples_each() -> None:
    left, right = atom(16), atom(24)
    groups = groups_of(w=(Concat((left, Product((frozen(2), right)))), frozen(3)))
    assert bounds(Constraints(channel_multiple=8), groups) == [(8, 16, 8), (4, 24, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_keep": 1.5}, "min_keep must be a share from 0 to 1; found 1.5"),
        ({"channel_multiple": 0}, "channel_multiple must be a whole number from 1 on; found 0"),
        ({"channel_multiple": 2.5}, "channel_multiple must be a whole number"),
        ({"normalised": "afterwards"}, "unknown value of normalised 'afterwards'; did you mean 'after'"),
        ({"exclude": "head"}, "exclude must be a list of patterns; found the text 'head'"),
        ({"bounds": {"up": (0.8, 0.5)}}, "bounds of 'up' must be 0 <= least <= most"),
        ({"bounds": {"up": (0, 0)}}, "most above 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Constraints(**options)


@pytest.mark.parametrize("field", ["include", "exclude", "bounds"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(field: str) -> None:
    patterns: Any = {"blok.down": (0, 1)} if field == "bounds" else ["blok.down"]
    with pytest.raises(
        PipelineError, match=r"'blok.down' matches no parameter that can be pruned; did you mean 'block.down"
    ):
        Constraints(**{field: patterns}).limits(two_layers())


@given(st.integers(1, 100), st.integers(1, 9), st.data())
def test_the_nearest_allowed_size_is_the_nearest(size: int, step: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(1, size))
    limits = Limits(np.array([low]), np.array([size]), np.array([step]))
    allowed = sorted({low, size, *(n for n in range(low, size) if n % step == 0)})
    wanted = data.draw(st.floats(0, 2 * size))
    found = int(limits.rounded([wanted])[0])
    assert found in allowed
    assert abs(found - wanted) == min(abs(n - wanted) for n in allowed)
    at = data.draw(st.sampled_from(allowed))
    assert int(limits.above(np.array([at]))[0]) == min((n for n in allowed if n > at), default=size)
    assert int(limits.below(np.array([at]))[0]) == max((n for n in allowed if n < at), default=low)

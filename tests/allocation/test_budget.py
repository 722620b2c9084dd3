"""What a budget may say."""

import math
from typing import Any

import pytest

from graphopt.allocation import Budget
from graphopt.errors import BudgetError


def test_up_to_one_is_a_share_and_above_is_absolute() -> None:
    budget = Budget(flops=0.5, params=1000, memory=1)
    assert budget.limits({"flops": 300.0, "params": 4000.0, "memory": 50.0}) == {
        "flops": 150,
        "params": 1000,
        "memory": 50,
    }


def test_a_cost_is_given_back_in_the_budgets_unit() -> None:
    budget = Budget(flops=0.5, params=1000)
    assert budget.in_own_unit("flops", 30, 300) == 0.1
    assert budget.in_own_unit("params", 30, 300) == 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "limits nothing; give at least one of flops, params, memory, latency"),
        ({"flops": 0}, "flops must be positive and finite; found 0"),
        ({"params": -1.0}, "params must be positive"),
        ({"memory": math.nan}, "memory must be positive and finite; found nan"),
        ({"flops": math.inf}, "finite"),
        ({"flops": "half"}, "flops must be a number; found 'half'"),
        ({"flops": True}, "flops must be a number; found True"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        Budget(**fields)
    assert caught.value.smallest == {}


def test_a_limit_without_a_cost_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"no table of measured latency for this target; give flops, params instead"):
        Budget(latency=0.5).limits({"flops": 1.0, "params": 1.0})


def test_budgets_are_values() -> None:
    assert Budget(flops=0.5) == Budget(flops=0.5)
    assert hash(Budget(flops=0.5)) == hash(Budget(flops=0.5))

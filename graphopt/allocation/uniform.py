"""Keep the same share of every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphopt.allocation.allocator import Floats, Keep, Problem
from graphopt.allocation.budget import Budget
from graphopt.allocation.constraints import Constraints
from graphopt.axes.algebra import Indices
from graphopt.cost import CostModel

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform:
    """Keep the largest share of every group with which the budget is met, as far as the constraints let it.

    Scores decide which indices of a group stay, not how many. What rounding leaves of the budget goes to the groups
    that would keep the smallest share.
    """

    name: ClassVar[str] = "uniform"

    def allocate(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Floats],
        cost: CostModel,
        budget: Budget,
        constraints: Constraints = Constraints(),  # noqa: B008  # frozen
    ) -> Keep:
        """Return the kept indices; see :meth:`Allocator.allocate`."""
        return Problem.of(groups, scores, cost, budget, constraints).solve(_choose, _prefer)


def _choose(problem: Problem) -> Indices:
    """Bisect the share: sizes, and with them costs, never fall when it grows."""
    full = problem.full
    sizes = problem.limits.rounded(full)
    if problem.fits(sizes):
        return sizes
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if problem.fits(problem.limits.rounded(full * middle)):
            low = middle
        else:
            high = middle
    return problem.limits.rounded(full * low)


def _prefer(problem: Problem, sizes: Indices) -> Floats:
    return -problem.limits.above(sizes) / problem.full

"""Rank the indices of all groups together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from graphopt.allocation.allocator import Floats, Keep, Problem
from graphopt.allocation.budget import Budget
from graphopt.allocation.constraints import Constraints
from graphopt.axes.algebra import Indices
from graphopt.cost import CostModel

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["GlobalThreshold"]


@dataclass(frozen=True)
class GlobalThreshold:
    """Keep the indices with the highest scores, whatever their group, as many as the budget allows.

    A group that would fall below its floor stays there, and the threshold rises until the budget is met all the same.
    Costs decide how many indices stay, not which: use scores that a normaliser made comparable. What rounding leaves of
    the budget goes to the highest scores that were dropped.

    Source: Gupta et al. 2022, arXiv:2209.14624, section 3 (minimum threshold), for indices in place of weights.
    """

    name: ClassVar[str] = "global-threshold"

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
    """Bisect the number of indices above the threshold: sizes, and with them costs, never fall when it grows."""
    count = len(problem.groups)
    owner = np.repeat(np.arange(count), problem.full)
    # Indices of groups that cannot shrink rank nowhere.
    candidates = np.flatnonzero((problem.limits.lower < problem.limits.upper)[owner])
    values = np.concatenate([*problem.scores, np.zeros(0)])[candidates]
    ranked = owner[candidates][np.argsort(-values, kind="stable")]

    def at(kept: int) -> Indices:
        return problem.limits.rounded(np.bincount(ranked[:kept], minlength=count))

    low, high = 0, len(ranked)
    if problem.fits(at(high)):
        return at(high)
    while high - low > 1:
        middle = (low + high) // 2
        if problem.fits(at(middle)):
            low = middle
        else:
            high = middle
    return at(low)


def _prefer(problem: Problem, sizes: Indices) -> Floats:
    """Prefer the group whose next indices score highest on average."""
    larger = problem.limits.above(sizes)
    gained = problem.kept_scores(larger) - problem.kept_scores(sizes)
    average: Floats = gained / np.maximum(larger - sizes, 1)
    return average

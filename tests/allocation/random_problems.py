"""Small random problems, and their best solutions by trying everything."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import nn

from graphopt.allocation import Budget, Constraints, Keep
from graphopt.axes.algebra import Axis, Reason, atom
from graphopt.axes.groups import Group
from graphopt.cost import CostModel
from tests.cost.handmade import typing_of

__all__ = ["SmallProblem", "kept_score", "small_problems"]

Floats = npt.NDArray[np.float64]
NAMES = ("flops", "params", "memory")


@dataclass(frozen=True)
class SmallProblem:
    """A cost model with a few groups, scores and a budget."""

    cost: CostModel
    scores: dict[str, Floats]
    budget: Budget

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, all of which may shrink."""
        return self.cost.groups

    @cached_property
    def limits(self) -> dict[str, float]:
        """The absolute limits."""
        return self.budget.limits({name: getattr(self.cost, name)(self.cost.full) for name in NAMES})

    def fits(self, sizes: npt.ArrayLike) -> bool:
        """Say whether sizes are within the budget."""
        return all(getattr(self.cost, name)(sizes) <= limit for name, limit in self.limits.items())

    def allowed(self, constraints: Constraints) -> list[list[int]]:
        """Return every size each group may take, found one by one."""
        limits = constraints.limits(self.groups)
        found = []
        for low, high, step in zip(limits.lower, limits.upper, limits.step, strict=True):
            found.append([n for n in range(low, high + 1) if n % step == 0 or n in (low, high)])
        return found

    def best_score(self, constraints: Constraints) -> float | None:
        """Return the highest sum of kept scores, or None where nothing fits."""
        kept = [np.concatenate([[0.0], np.cumsum(np.sort(self.scores[g.name])[::-1])]) for g in self.groups]
        every = np.array(list(product(*self.allowed(constraints))))
        scores = np.sum([k[sizes] for k, sizes in zip(kept, every.T, strict=True)], axis=0)
        best_first = np.argsort(-scores)
        return next((float(scores[i]) for i in best_first if self.fits(every[i])), None)


def kept_score(problem: SmallProblem, keep: Keep) -> float:
    """Return the sum of the scores of everything that stays."""
    return sum(
        float(problem.scores[g.name][keep[g.atom]].sum() if g.atom in keep else problem.scores[g.name].sum())
        for g in problem.groups
    )


def small_problems(
    *,
    most_groups: int = 4,
    most_indices: int = 5,
    linear: bool = False,
    budgets: tuple[str, ...] = NAMES,
    least_share: float = 0.05,
) -> st.SearchStrategy[SmallProblem]:
    """Draw a problem; costs are linear, or have squares and products of sizes.

    Only the number of groups and a seed are drawn, which is many times faster than to draw every number.
    """

    def make(count: int, seed: int) -> SmallProblem:
        rng = np.random.default_rng(seed)
        atoms = [atom(int(n)) for n in rng.integers(2, most_indices + 1, count)]

        def fixed() -> Axis:
            return atom(int(rng.integers(2, 31)), Reason("fixed", "test"))

        def term() -> tuple[Axis, ...]:
            factors = 1 if linear else int(rng.integers(1, 3))
            return (*(atoms[rng.integers(count)] for _ in range(factors)), fixed())

        tensors: dict[str, tuple[torch.Tensor, tuple[Axis, ...]]] = {}
        for i, each in enumerate(atoms):
            other = fixed() if linear or rng.random() < 0.3 else atoms[rng.integers(count)]
            tensors[f"w{i}.weight"] = nn.Parameter(torch.empty(each.size, other.size)), (each, other)
        macs = [(each, fixed()) for each in atoms] + [term() for _ in range(rng.integers(0, 4))]
        cost = CostModel(typing_of(tensors, macs, results=[term() for _ in range(rng.integers(1, 5))]))
        scores = {g.name: rng.integers(1, 101, g.size).astype(np.float64) for g in cost.groups}
        named = rng.choice(budgets, rng.integers(1, len(budgets) + 1), replace=False)
        return SmallProblem(cost, scores, Budget(**{name: float(rng.uniform(least_share, 1)) for name in named}))

    return st.builds(make, st.integers(1, most_groups), st.integers(0, 2**32 - 1))

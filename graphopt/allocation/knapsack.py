"""Weigh the score that is lost against the cost that is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from graphopt.allocation.allocator import Floats, Keep, Problem
from graphopt.allocation.budget import Budget
from graphopt.allocation.constraints import Constraints
from graphopt.axes.algebra import Indices
from graphopt.cost import CostModel

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["Knapsack"]

STEPS = 16
"""In how many steps the costs come down to the budget, if no group is in the way."""

STRIDE = 0.15
"""Share of a group's levels that one step moves it by at most: as far as a linear cost is trusted."""

FINEST = 0.02
"""Stride at which sizes count as settled when a step no longer helps; strides are halved down to it."""

SMALL = 64
"""Up to how many blocks in all a result is improved by exchanging single blocks; beyond, no block weighs enough."""

TINY = 1e-300


@dataclass(frozen=True)
class Knapsack:
    """Keep the highest sum of scores that the budget allows.

    Maximises the kept scores Σ_g S_g(n_g) over the sizes n_g, S_g being the sum of a group's n_g highest scores, such
    that every limited cost stays within its budget. S_g is concave. Costs are polynomials, so what an index saves
    depends on all sizes: from the whole model on, costs are linearised at the current sizes, the linear problem is
    solved exactly up to one block by taking blocks in the order of score over price, and sizes move a short way
    towards its solution; then costs are linearised anew. An index that was dropped comes back when its price has
    fallen. The price under several budgets is the sum of the shares of each budget, weighted by how hard each binds.
    Small problems are polished by exchanging single blocks at exact costs.

    A linear sum of scores favours extremes: where all scores are about alike, the dearest groups are cut down to their
    floor before others are touched. Scores that grow as a group shrinks (the normalisers ``lamp`` and ``distortion``)
    spread the loss.

    Source: the multidimensional knapsack heuristic of Toyoda 1975 (Management Science 21(12)), which drops what has
    the least value for its share of scarce resources, with the linearisation renewed as it proceeds.
    """

    name: ClassVar[str] = "knapsack"

    def allocate(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Floats],
        cost: CostModel,
        budget: Budget,
        constraints: Constraints = Constraints(),  # noqa: B008  # frozen
    ) -> Keep:
        """Return the kept indices; see :meth:`Allocator.allocate`."""
        problem = Problem.of(groups, scores, cost, budget, constraints)
        lowest = min((float(s[-1]) for s in problem.scores if len(s)), default=0.0)
        if lowest < 0:
            # Keeping an index is never worse than not: only differences matter.
            problem = replace(problem, scores=tuple(s - lowest for s in problem.scores))
        solver = _Solver()
        return problem.solve(solver.choose, solver.prefer)


class _Blocks:
    """The steps by which groups may grow, from the lower bound to the upper, flattened.

    ``owner``, ``rank`` (1 for a group's first), ``width`` (indices) and ``value`` (score) have one entry a block; a
    group's blocks stand together, and their value per index falls. ``levels`` is how many each group has.
    """

    def __init__(self, problem: Problem) -> None:
        bounds = zip(problem.limits.lower, problem.limits.upper, problem.limits.step, strict=True)
        ladders = [_ladder(int(low), int(high), int(step)) for low, high, step in bounds]
        self.levels: Indices = np.array([len(ladder) - 1 for ladder in ladders], dtype=np.int64)
        self._sizes: Indices = np.concatenate([*ladders, np.zeros(0, dtype=np.int64)])
        self._start: Indices = np.cumsum(self.levels + 1) - self.levels - 1
        self.owner: Indices = np.repeat(np.arange(len(ladders)), self.levels)
        first = np.cumsum(self.levels) - self.levels
        self.rank: Indices = np.arange(1, len(self.owner) + 1) - first[self.owner]
        above = self._sizes[self._start[self.owner] + self.rank]
        below = self._sizes[self._start[self.owner] + self.rank - 1]
        self.width: Indices = above - below
        self.value: Floats = problem.kept_scores_of(self.owner, above) - problem.kept_scores_of(self.owner, below)

    def sizes(self, levels: Indices) -> Indices:
        """Return the size of every group at its level."""
        sizes: Indices = self._sizes[self._start + levels]
        return sizes


def _ladder(low: int, high: int, step: int) -> Indices:
    """Return the allowed sizes from ``low`` to ``high``, ascending."""
    if low == high:
        return np.array([low], dtype=np.int64)
    return np.concatenate([[low], np.arange((low // step + 1) * step, high, step), [high]]).astype(np.int64)


class _Solution(NamedTuple):
    """Sizes within the limits, and the sum of the scores they lose."""

    sizes: Indices
    lost: float


class _Solver:
    """Solve one problem; ``weights`` says how hard each limit binds, and is learnt on the way."""

    def __init__(self) -> None:
        self.weights: Floats = np.ones(1)

    def choose(self, problem: Problem) -> Indices:
        """Return sizes within the limits."""
        blocks = _Blocks(problem)
        levels = blocks.levels
        used = problem.used(blocks.sizes(levels))
        if (used <= 1).all():
            return blocks.sizes(levels)
        self.weights = np.where(used > 1, np.log(np.maximum(used, 1)), 1e-3)
        rate = float(used.max()) ** (-1 / STEPS)
        for _ in range(8 * STEPS):
            levels = self._towards(problem, blocks, levels, np.maximum(1, used * rate), STRIDE)
            used = problem.used(blocks.sizes(levels))
            if (used <= 1).all():
                break
        best = self._finished(problem, blocks.sizes(levels))
        stride = STRIDE
        for _ in range(STEPS):
            moved = self._towards(problem, blocks, levels, np.ones_like(used), stride)
            found = self._finished(problem, blocks.sizes(moved))
            if found.lost < best.lost * (1 - 1e-6):
                best, levels = found, moved
            elif stride > FINEST:
                stride /= 2
            else:
                break
        if len(blocks.owner) <= SMALL:
            best = self._polished(problem, best)
        return best.sizes

    def prefer(self, problem: Problem, sizes: Indices) -> Floats:
        """Return the score over price of each group's next block."""
        larger = problem.limits.above(sizes)
        price = (self.weights @ problem.prices(sizes)) * (larger - sizes)
        return (problem.kept_scores(larger) - problem.kept_scores(sizes)) / np.maximum(price, TINY)

    def _towards(self, problem: Problem, blocks: _Blocks, levels: Indices, targets: Floats, stride: float) -> Indices:
        """Move towards the solution of the problem that is linear at these levels, and weigh the limits anew."""
        sizes = blocks.sizes(levels)
        prices = problem.prices(sizes)
        reach = np.maximum(1, (stride * sizes / problem.limits.step).astype(np.int64))
        bottom, top = np.maximum(levels - reach, 0), np.minimum(levels + reach, blocks.levels)
        near = np.flatnonzero((blocks.rank > bottom[blocks.owner]) & (blocks.rank <= top[blocks.owner]))
        owner, width = blocks.owner[near], blocks.width[near]
        density = blocks.value[near] / np.maximum((self.weights @ prices)[owner] * width, TINY)
        # Of equal blocks the ones lower in their group come first, so that no group gives all before another gives any.
        density *= 1 - 1e-9 * blocks.rank[near] / blocks.levels[owner]
        order = np.argsort(-density, kind="stable")
        start = problem.used(sizes) + prices @ (blocks.sizes(bottom) - sizes)
        used = start[:, None] + np.cumsum(prices[:, owner[order]] * width[order], axis=1)
        taken = int((used <= targets[:, None]).all(axis=0).sum())
        moved: Indices = bottom + np.bincount(owner[order[:taken]], minlength=len(levels))
        if len(self.weights) > 1:
            ratio = problem.used(blocks.sizes(moved)) / targets
            weights = self.weights * np.clip(ratio**8, 0.25, 4)
            self.weights = np.maximum(weights / weights.sum(), 1e-6)
        return moved

    def _finished(self, problem: Problem, sizes: Indices) -> _Solution:
        """Bring sizes within the limits and use up what is left."""
        sizes = problem.filled(self._reduced(problem, sizes), self.prefer)
        return _Solution(sizes, float((problem.kept_scores(problem.full) - problem.kept_scores(sizes)).sum()))

    def _reduced(self, problem: Problem, sizes: Indices) -> Indices:
        """Drop the blocks that lose least for what they save, one by one, until every limit is kept."""
        sizes = sizes.copy()
        while not problem.fits(sizes):
            smaller = problem.limits.below(sizes)
            exceeded = problem.used(sizes) > 1
            saved = ((self.weights * exceeded) @ problem.prices(sizes)) * (sizes - smaller)
            lost = problem.kept_scores(sizes) - problem.kept_scores(smaller)
            density = np.where(smaller < sizes, (lost + TINY) / np.maximum(saved, TINY), np.inf)
            least = int(np.argmin(density))
            sizes[least] = smaller[least]
        return sizes

    def _polished(self, problem: Problem, best: _Solution) -> _Solution:
        """Drop one block, or force one in, and finish from there; as long as that helps."""
        improved = True
        while improved:
            improved = False
            for group in np.flatnonzero(problem.limits.lower < problem.limits.upper):
                for move in (problem.limits.below, problem.limits.above):
                    changed = best.sizes.copy()
                    changed[group] = move(best.sizes)[group]
                    if changed[group] == best.sizes[group]:
                        continue
                    lower, upper = problem.limits.lower.copy(), problem.limits.upper.copy()
                    lower[group] = upper[group] = changed[group]
                    held = replace(problem, limits=replace(problem.limits, lower=lower, upper=upper))
                    if held.fits(lower):
                        found = self._finished(held, changed)
                        if found.lost < best.lost * (1 - 1e-9):
                            best, improved = found, True
        return best

"""Say what an allocator is given and what it returns, and hold what all of them share.

What may live here: the protocol, the problem in the form that solvers work on, the order in which groups are reached
for, and the last step of every solver, which uses up what is left of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from graphopt.allocation.budget import Budget
from graphopt.allocation.constraints import Constraints, Limits
from graphopt.axes.algebra import Atom, Indices
from graphopt.cost import CostModel, Polynomial, Quantity
from graphopt.errors import BudgetError, PassError

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["Allocator", "Floats", "Keep", "Problem"]

Floats = npt.NDArray[np.float64]
Keep = dict[Atom, Indices]
"""The sorted kept indices of every group that loses some, by the group's atom."""

RESERVE = 0.5
"""Share of every other group that stays before groups that are normalised over are reached for."""


@runtime_checkable
class Allocator(Protocol):
    """Choose what stays. Implementations are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    def allocate(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Floats],
        cost: CostModel,
        budget: Budget,
        constraints: Constraints = ...,
    ) -> Keep:
        """Return the kept indices of every group that loses some.

        The highest scores of each group stay; of equal ones the first. What stays costs no more than the budget in
        any of its fields, and no group could keep its next index, or its next step of indices, without exceeding one.

        Args:
            groups: the groups that may shrink; others of the cost model stay whole.
            scores: one score an index, by the group's name.
            cost: the cost model of the graph the groups belong to.
            budget: what the result may cost.
            constraints: which sizes groups may take.

        Raises:
            BudgetError: the budget cannot be met; ``smallest`` holds what can, in the budget's own units.
            PassError: a group has no scores, or some that are not finite.
        """
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose a size for each group such that costs stay within limits.

    Vectors have one entry a group of the *cost model*; groups that may not shrink have equal bounds.

    Attributes:
        groups: All groups of the cost model.
        full: The size of each group.
        order: The indices of each group from the highest score to the lowest.
        scores: The scores in that order.
        quantities: What is limited, with its limit, by the budget's names.
        limits: The sizes that groups may take.
        normalised: Which groups are normalised over.
        budget: The budget, for messages.
    """

    groups: tuple[Group, ...]
    full: Indices
    order: tuple[Indices, ...]
    scores: tuple[Floats, ...]
    quantities: Mapping[str, tuple[Quantity, float]]
    limits: Limits
    normalised: npt.NDArray[np.bool_]
    budget: Budget
    constraints: Constraints

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        scores: Mapping[str, Floats],
        cost: CostModel,
        budget: Budget,
        constraints: Constraints,
    ) -> Problem:
        """State the problem; arguments and errors as in :meth:`Allocator.allocate`."""
        free = {group.atom for group in groups}
        values = [_checked(group, scores) if group.atom in free else np.zeros(group.size) for group in cost.groups]
        order = tuple(np.argsort(-v, kind="stable") for v in values)
        known: dict[str, Quantity] = {"flops": cost.flops, "params": cost.params, "memory": cost.memory}
        limits = budget.limits({name: quantity(cost.full) for name, quantity in known.items()})
        # Patterns may name groups that are not to shrink this time.
        wanted = constraints.limits(cost.groups, cost.names)
        shrinks = np.array([g.atom in free for g in cost.groups], dtype=bool)
        lower, upper = (np.where(shrinks, bound, cost.full) for bound in (wanted.lower, wanted.upper))
        return cls(
            groups=cost.groups,
            full=cost.full,
            order=order,
            scores=tuple(v[o] for v, o in zip(values, order, strict=True)),
            # A model without multiplications, say, keeps any limit of them.
            quantities={name: (known[name], limit) for name, limit in limits.items() if known[name](cost.full) > 0},
            limits=Limits(lower, upper, wanted.step),
            normalised=np.array([bool(g.normalised) for g in cost.groups], dtype=bool),
            budget=budget,
            constraints=constraints,
        )

    # -- costs --

    def used(self, sizes: npt.ArrayLike) -> Floats:
        """Return what each limited quantity uses, as a share of its limit."""
        return np.array([quantity(sizes) / limit for quantity, limit in self.quantities.values()])

    def fits(self, sizes: npt.ArrayLike) -> bool:
        """Say whether every limit is kept."""
        return all(quantity(sizes) <= limit for quantity, limit in self.quantities.values())

    def prices(self, sizes: npt.ArrayLike) -> Floats:
        """Return what one index of each group costs, (limited quantities, groups), as shares of the limits."""
        return np.array([quantity.gradient(sizes) / limit for quantity, limit in self.quantities.values()])

    # -- scores --

    def kept_scores(self, sizes: Indices) -> Floats:
        """Return the sum of the scores that each group keeps at these sizes."""
        return self.kept_scores_of(np.arange(len(self.groups)), sizes)

    def kept_scores_of(self, groups: Indices, sizes: Indices) -> Floats:
        """Return the sum of the scores that each of the named groups keeps at its size."""
        kept: Floats = self._prefix[self._start[groups] + sizes]
        return kept

    @cached_property
    def _prefix(self) -> Floats:
        return np.concatenate([np.concatenate([[0.0], np.cumsum(s)]) for s in self.scores] or [np.zeros(1)])

    @cached_property
    def _start(self) -> Indices:
        return np.cumsum(np.concatenate([[0], self.full + 1]))[:-1].astype(np.int64)

    # -- solving --

    def solve(self, choose: Callable[[Problem], Indices], prefer: Callable[[Problem, Indices], Floats]) -> Keep:
        """Return the kept indices.

        Args:
            choose: makes sizes within the limits, from a problem that has a solution. What it leaves of the budget is
                used up afterwards; sizes that exceed the budget are a mistake.
            prefer: says, at some sizes, which group should grow next: the one with the highest value.

        Raises:
            BudgetError: there is no solution.
        """
        stage = self
        for stage in self._stages():
            if stage.fits(stage.limits.lower):
                sizes = stage.filled(choose(stage), prefer)
                return self._kept(sizes)
        raise self._infeasible(stage.limits.lower)

    def filled(self, sizes: Indices, prefer: Callable[[Problem, Indices], Floats]) -> Indices:
        """Let groups grow, step by step, until none can without exceeding a limit."""
        assert self.fits(sizes), "an allocator exceeded the budget"
        sizes = sizes.copy()
        # Costs never fall when a group grows, so a group that cannot grow now cannot grow later.
        growing = self._can_grow(sizes)
        while growing.any():
            best = int(np.argmax(np.where(growing, prefer(self, sizes), -np.inf)))
            before = sizes[best]
            sizes[best] = self.limits.above(sizes)[best]
            if self.fits(sizes):
                growing &= self._can_grow(sizes)
            else:
                sizes[best] = before
                growing[best] = False
        return sizes

    def _can_grow(self, sizes: Indices) -> npt.NDArray[np.bool_]:
        """Say which groups are not at their upper bound and could grow alone, as far as polynomials tell."""
        growing = sizes < self.limits.upper
        steps = self.limits.above(sizes) - sizes
        for quantity, limit in self.quantities.values():
            if isinstance(quantity, Polynomial):
                growing &= quantity(sizes) + quantity.changes(sizes, steps) <= limit * (1 + 1e-12)
        return growing

    def _stages(self) -> Iterator[Problem]:
        """Yield the problems to try in turn: each may shrink more than the one before.

        With ``normalised="after"`` other groups first shrink down to half; where that does not suffice they stay at
        half or below, and the groups that are normalised over shrink along with them. So the result changes little
        where a budget is just beyond what the others can give.
        """
        rule, bounds = self.constraints.normalised, self.limits
        if rule == "together" or not self.normalised.any():
            yield self
            return
        whole = np.where(self.normalised, bounds.upper, bounds.lower)
        if rule == "never":
            yield replace(self, limits=replace(bounds, lower=whole))
            return
        half = bounds.rounded(self.full * RESERVE)
        yield replace(self, limits=replace(bounds, lower=np.maximum(whole, half)))
        yield replace(self, limits=replace(bounds, upper=np.where(self.normalised, bounds.upper, half)))

    def _kept(self, sizes: Indices) -> Keep:
        return {
            group.atom: np.sort(order[:size]).astype(np.int64, copy=False)
            for group, order, size in zip(self.groups, self.order, sizes, strict=True)
            if size < group.size
        }

    def _infeasible(self, smallest: Indices) -> BudgetError:
        reachable, sentences = {}, []
        for name, (quantity, limit) in self.quantities.items():
            original, least = quantity(self.full), quantity(smallest)
            reachable[name] = self.budget.in_own_unit(name, least, original)
            if least > limit:
                sentences.append(
                    f"{name}={getattr(self.budget, name):g} asks for at most {limit:.4g} of {original:.4g}, and "
                    f"{least:.4g} is the smallest reachable: {name}={_rounded_up(reachable[name])}"
                )
        shrinking = int((self.limits.lower < self.full).sum())
        kept_whole = int(self.normalised.sum()) if self.constraints.normalised == "never" else 0
        advice = "raise the budget, lower min_keep or channel_multiple, or exclude less"
        if kept_whole:
            advice += f"; {kept_whole} groups that are normalised over stay whole (normalised='never')"
        return BudgetError(
            f"the budget cannot be met: {'; '.join(sentences)}. {shrinking} of {len(self.groups)} groups may shrink, "
            f"each to {self.constraints.min_keep:.0%} at least unless it has bounds of its own; {advice}",
            smallest=reachable,
        )


def _rounded_up(value: float) -> str:
    """Write a number such that what is written suffices."""
    if value > 1:
        return str(int(-(-value // 1)))
    return f"{-(-value * 10000 // 1) / 10000:g}"


def _checked(group: Group, scores: Mapping[str, Floats]) -> Floats:
    values = scores.get(group.name)
    if values is None or np.shape(values) != (group.size,):
        found = "none" if values is None else f"an array of shape {np.shape(values)}"
        raise PassError(f"group {group.name} needs {group.size} scores, one an index; the criterion gave {found}")
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise PassError(
            f"group {group.name} has scores that are not finite; look for NaN or infinity in its parameters "
            "or in the calibration data"
        )
    return values

"""Remove the indices of coupling groups that matter least, until a budget is met."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from graphopt.allocation import ALLOCATORS, Allocator, Budget, Constraints, Keep, Knapsack
from graphopt.cost import CostModel
from graphopt.dialects import infer
from graphopt.errors import PassError, PipelineError
from graphopt.graph import Graph
from graphopt.importance import CRITERIA, L2, Criterion, ScoreContext
from graphopt.pipeline import Context, Pass, PassResult, Preserves, Removal, choice, register
from graphopt.report import at_stake
from graphopt.report.wording import listing, plural

if TYPE_CHECKING:
    from graphopt.axes.groups import Group
    from graphopt.axes.infer import Typing


@register
@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels, heads and widths, with all that is coupled to them, to meet a budget.

    Axes are inferred as types, every free group's indices are scored over all their coupled slices, an allocator
    solves for the sizes at which the budget is met with the least score lost, and tensors and size arguments are cut.
    What is left computes what the model computes with the removed indices' parameters set to zero; where something
    normalises over a group, over the kept indices alone.

    Args:
        importance: how indices are scored.
        allocation: how scores and costs become sizes.
        budget: what the model may cost; the caller's budget where it is not given.
        constraints: which groups may shrink, and how far.
        progress: how far this pass goes, from 0, the model as it entered the pipeline, to 1, the budget: to
            ``cost^(1 - progress) · budget^progress``, so that steps at 1/k, 2/k, … each leave the same share of what
            they find.

    Source: the criteria and the allocators name theirs; groups across layers as in Fang et al. 2023, arXiv:2301.12900.
    """

    name: ClassVar[str] = "prune-channels"
    preserves: ClassVar[Preserves] = Preserves.MASKED
    needs_values: ClassVar[bool] = False

    importance: Criterion = field(default=L2(), metadata=choice(CRITERIA))
    allocation: Allocator = field(default=Knapsack(), metadata=choice(ALLOCATORS))
    budget: Budget | None = None
    constraints: Constraints = field(default_factory=Constraints)
    progress: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.progress <= 1:
            raise PipelineError(f"progress must be above 0 and at most 1; found {self.progress}")

    def run(self, graph: Graph, context: Context) -> PassResult:
        typing = infer(graph)
        _check_finite(typing)
        costs = CostModel(typing)
        budget = self._budget(context, costs)
        constraints = dataclasses.replace(
            self.constraints,
            channel_multiple=lcm(self.constraints.channel_multiple, context.channel_multiple),
        )
        groups = [group for group in typing.groups if group.name not in context.left_alone]
        scoring = ScoreContext(typing, context.calibration, context.loss)
        scores = self._seeded(context.seed).score(scoring)
        keep = self.allocation.allocate(groups, scores, costs, budget, constraints)
        self._account(costs, constraints, keep, scoring, context)
        return PassResult(graph, Removal(typing, keep) if keep else None)

    def _budget(self, context: Context, costs: CostModel) -> Budget:
        """Return the budget; fractions of it refer to the model that entered the pipeline."""
        if self.budget is not None and context.budget is not None:
            raise PipelineError(
                f"{self.name} has a budget of its own ({self}), and the caller gives one too ({context.budget}): "
                "leave one of them out"
            )
        budget = self.budget or context.budget
        if budget is None:
            raise PipelineError(
                f"{self.name} has no budget: give one to the pass, {self.name}{{budget.flops=0.5}}, or to the call, "
                "budget=graphopt.Budget(flops=0.5)"
            )
        if context.original == costs.cost() and self.progress == 1:
            return budget
        original = {name: getattr(context.original, name) for name in ("flops", "params", "memory")}
        limits = budget.limits(original)
        part = self.progress
        return Budget(**{n: max(limit, original[n] ** (1 - part) * limit**part) for n, limit in limits.items()})

    def _seeded(self, seed: int) -> Any:
        """Return the criterion; one that draws at random draws anew for every seed of the run."""
        names = {f.name for f in dataclasses.fields(self.importance)}  # type: ignore[arg-type]  # criteria are dataclasses
        if "seed" not in names:
            return self.importance
        return dataclasses.replace(self.importance, seed=self.importance.seed + seed)  # type: ignore[type-var,attr-defined]

    def _account(
        self, costs: CostModel, constraints: Constraints, keep: Keep, scoring: ScoreContext, context: Context
    ) -> None:
        """Say of every group what was done with it, or why nothing was, and what the criterion had to say of it."""
        typing = scoring.typing
        limits = constraints.limits(typing.groups, costs.names)
        stakes = at_stake(costs)
        for group, lower in zip(typing.groups, limits.lower, strict=True):
            params, flops = stakes[group.atom]
            facts = {
                "role": group.role,
                "size": group.size,
                "kept": len(keep[group.atom]) if group.atom in keep else group.size,
                "places": [str(place) for place in group.places],
                "normalised": list(group.normalised),
                "params": params,
                "flops": flops,
            }
            layer = typing.graph.layer_of(group.places[0].tensor)
            facts |= {"layer": layer} if layer else {}
            note = f"; {scoring.notes[group.name]}" if group.name in scoring.notes else ""
            if group.atom in keep:
                what = f"kept {facts['kept']} of {plural(group.size, 'index', 'indices')}"
                context.applied(group.name, what + note, **facts)
            else:
                reason = self._why_whole(group, bool(lower == group.size), constraints, context.left_alone)
                context.skipped(group.name, reason + note, **facts)

    def _why_whole(self, group: Group, bound: bool, constraints: Constraints, left_alone: Mapping[str, str]) -> str:
        if group.name in left_alone:
            return f"left alone: cutting it gave a wrong model ({left_alone[group.name]})"
        if bound:
            return (
                f"all {group.size} indices must stay: excluded, or the bounds allow no less "
                f"(min_keep {constraints.min_keep:g}, multiples of {constraints.channel_multiple})"
            )
        if group.normalised and constraints.normalised != "together":
            over = f"{plural(len(group.normalised), 'operator')} normalise over it ({listing(group.normalised)})"
            if constraints.normalised == "never":
                return f"{over}, and such groups stay whole (normalised=never)"
            return f"{over}, and the budget was met without it (normalised=after)"
        return f"each of its {group.size} indices is worth more than the budget it takes"


def _check_finite(typing: Typing) -> None:
    """Refuse parameters without a magnitude: no criterion could rank their indices."""
    for name, tensor in typing.graph.tensors().items():
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.is_meta:
            continue  # the scores of one that is read from a checkpoint are looked at instead
        # A sum that is finite says that every entry is; one that is not may just have overflowed.
        if not bool(torch.isfinite(tensor.detach().sum())) and not bool(torch.isfinite(tensor.detach()).all()):
            raise PassError(
                f"the parameter {name} holds NaN or infinity, so its indices cannot be ranked: repair the weights, "
                "or load a checkpoint from before they broke"
            )

"""Say which models come back in their own class, and which line of code cannot follow in the others.

`python -m tests.zoo.classes` writes `classes.json` anew: for each model the refusals, one after the other, each with
what it said to keep whole, until the class was given back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.allocation import Budget, Constraints
from graphopt.capture import capture
from graphopt.errors import BudgetError, PlanError
from graphopt.graph import Graph
from graphopt.passes.prune.prune_channels import PruneChannels
from graphopt.plan import Plan
from graphopt.shrink.module import follow
from graphopt.testing import try_pass
from tests.zoo import ZOO, quiet

__all__ = ["CLASSES", "given_back", "patterns", "pruned", "reason"]

CLASSES = Path(__file__).with_name("classes.json")

MOST_ROUNDS = 12
"""How often a refusal is answered by keeping more whole."""


def pruned(graph: Graph, exclude: Iterable[str] = ()) -> tuple[Plan, Graph]:
    """Remove half of the multiply-adds, as the tests of pruning do; return the plan and the pruned graph."""
    constraints = Constraints(exclude=tuple(exclude))
    trial = try_pass(PruneChannels(budget=Budget(flops=0.5), constraints=constraints), graph)
    removal = trial.result.removal
    assert removal is not None
    return Plan.of(removal.typing, removal.keep), trial.after


def given_back(model: nn.Module, plan: Plan, graph: Graph) -> nn.Module | PlanError:
    """Return the model in its own class, or why it cannot be; ``graph`` was captured of it."""
    with quiet():
        try:
            return follow(model, plan.keep, graph)
        except PlanError as error:
            return error


def reason(error: PlanError) -> dict[str, Any]:
    """Return what the table keeps of a refusal."""
    return {"module": error.module, "code": error.code, "exclude": list(error.exclude)}


def patterns(rounds: list[dict[str, Any]]) -> list[str]:
    """Return all that the refusals of a model said to keep whole."""
    return sorted({pattern for each in rounds for pattern in each.get("exclude", ())})


def measure(model: nn.Module, graph: Graph) -> list[dict[str, Any]]:
    """Prune and apply until the class is given back; return the refusals, the last one with what stops that, if so."""
    rounds: list[dict[str, Any]] = []
    for _ in range(MOST_ROUNDS):
        try:
            plan, _ = pruned(graph, patterns(rounds))
        except BudgetError:
            return [*rounds, {"never": "with all that whole, half of the multiply-adds cannot be removed"}]
        found = given_back(model, plan, graph)
        if not isinstance(found, PlanError):
            return rounds
        known = set(patterns(rounds))
        rounds.append(reason(found))
        if set(patterns(rounds)) == known:
            break
    return [*rounds, {"never": "the refusals name nothing more to keep whole"}]


def main(names: list[str]) -> None:
    """Measure the named models, or all, and update the file."""
    found = json.loads(CLASSES.read_text()) if CLASSES.exists() else {}
    for name in names or ZOO:
        model, inputs = ZOO[name].build(), ZOO[name].inputs()
        found[name] = measure(model, capture(model, inputs))
        print(name, found[name], flush=True)
        CLASSES.write_text(json.dumps({n: found[n] for n in ZOO if n in found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

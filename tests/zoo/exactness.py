"""Measure how exactly a model is pruned: each group alone, all together, with uneven index sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing
from graphopt.rewrite import rewrite
from graphopt.verify import Difference, difference, evaluate, masked_outputs

__all__ = ["Exactness", "alone", "compare", "draw", "measure"]


@dataclass(frozen=True)
class Exactness:
    """The largest relative differences between the pruned model and its masked original.

    Attributes:
        groups: How many groups were pruned alone.
        alone: The worst of the groups pruned one by one.
        worst: That group's name.
        together: All groups at once.
        single: All groups at once, in float32.
    """

    groups: int
    alone: float
    worst: str
    together: float
    single: float


def draw(groups: Sequence[Group], seed: int) -> dict[Atom, Indices]:
    """Draw what each group keeps: another number and other indices for each."""
    rng = np.random.default_rng(seed)
    return {
        g.atom: np.sort(rng.permutation(g.size)[: rng.integers(g.least, g.size)]) for g in groups if g.least < g.size
    }


def compare(typing: Typing, keep: Mapping[Atom, Indices], *, double: bool) -> Difference:
    """Compare the pruned model with its masked original on the example inputs."""
    args, kwargs = typing.graph.example_inputs
    expected = masked_outputs(typing, keep, args, kwargs, double=double)
    return difference(expected, evaluate(rewrite(typing, keep), args, kwargs, double=double), double=double)


def alone(typing: Typing, groups: Sequence[Group], seed: int = 0) -> tuple[float, str]:
    """Prune each of these groups alone, in float64; return the worst difference and its group."""
    worst, name = 0.0, ""
    for number, group in enumerate(groups):
        found = compare(typing, draw([group], seed + number), double=True).relative
        if not found <= worst:
            worst, name = found, group.name
    return worst, name


def measure(typing: Typing, groups: Sequence[Group] | None = None, seed: int = 0) -> Exactness:
    """Measure a typed model; ``groups`` are those to prune alone, all of them unless given."""
    single = typing.groups if groups is None else groups
    worst, name = alone(typing, single, seed)
    keep = draw(typing.groups, seed)
    together = compare(typing, keep, double=True).relative
    return Exactness(len(single), worst, name, together, compare(typing, keep, double=False).relative)

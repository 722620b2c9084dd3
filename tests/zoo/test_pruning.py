"""Prune the sixty models: every budget met, every result exact, and nothing frozen that was free before.

`coverage.json` says of each model which groups are free and which dimensions are frozen, and why. After a change that
is meant to alter it, write it anew with `python -m tests.zoo.coverage` and read the difference.
"""

from __future__ import annotations

import json

import pytest
import torch

import graphopt
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from tests.zoo import ZOO
from tests.zoo.coverage import COVERAGE, coverage
from tests.zoo.exactness import measure

pytestmark = pytest.mark.zoo

ALONE = 6
"""How many groups of each model are pruned alone; `benchmarks/zoo_exactness.py` prunes all."""

EXPECTED = json.loads(COVERAGE.read_text())


@pytest.mark.parametrize("name", ZOO)
def test_groups_alone_and_together_are_exact(name: str) -> None:
    model = ZOO[name]
    typing = infer(capture(model.build(), model.inputs()))
    assert coverage(typing) == EXPECTED[name]
    step = max(1, len(typing.groups) // ALONE)
    found = measure(typing, typing.groups[::step][:ALONE])
    assert found.alone <= 1e-10, found.worst
    assert found.together <= 1e-10
    assert found.single <= 1e-4


@pytest.mark.parametrize("name", ZOO)
def test_half_the_multiply_adds_are_removed(name: str) -> None:
    model = ZOO[name].build()
    args, kwargs = ZOO[name].inputs()
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        before = model(*args, **kwargs)
    result = graphopt.optimize(model, (args, kwargs), budget=graphopt.Budget(flops=0.5))
    share = result.report.after.flops / result.report.before.flops
    assert 0.47 <= share <= 0.5
    assert all(comparison.passed for comparison in result.report.comparisons)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    other = ZOO[name].inputs(batch=3)
    with torch.no_grad():
        after = result.module(*other.args, **other.kwargs)
    assert type(after) is type(before)

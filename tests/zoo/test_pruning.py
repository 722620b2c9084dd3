"""Prune the sixty models: every budget met, every result exact, and nothing frozen that was free before.

`coverage.json` says of each model which groups are free and which dimensions are frozen, and why. After a change that
is meant to alter it, write it anew with `python -m tests.zoo.coverage` and read the difference.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.targets.onnx import OnnxTarget
from tests.zoo import ZOO, quiet
from tests.zoo.captured import MODELS, captured
from tests.zoo.coverage import COVERAGE, coverage
from tests.zoo.exactness import measure

pytestmark = pytest.mark.zoo

ALONE = 6
"""How many groups of each model are pruned alone; `benchmarks/zoo_exactness.py` prunes all."""

EXPECTED = json.loads(COVERAGE.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_groups_alone_and_together_are_exact(name: str) -> None:
    _, typing = captured(name)
    assert coverage(typing) == EXPECTED[name]
    step = max(1, len(typing.groups) // ALONE)
    found = measure(typing, typing.groups[::step][:ALONE])
    assert found.alone <= 1e-10, found.worst
    assert found.together <= 1e-10
    assert found.single <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_half_the_multiply_adds_are_removed_and_the_rest_runs_in_onnx_runtime(name: str) -> None:
    model, typing = captured(name)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    result = graphopt.optimize(typing.graph, target=OnnxTarget(channel_multiple=1), budget=graphopt.Budget(flops=0.5))
    report = result.report.to_dict()
    (budget,) = report["budget"]
    assert budget["achieved"] <= budget["target"] == 0.5 * budget["original"]
    (pruning,) = (each for each in report["passes"] if each["name"] == "prune-channels")
    assert 0.47 * budget["original"] <= pruning["after"]["flops"] <= budget["target"]
    assert pruning["comparisons"]
    for each in report["passes"]:
        assert all(c["passed"] for c in each["comparisons"])
        assert (each["left_alone"], each["left_out"]) == ({}, "")
    ran = [c for c in report["comparisons"] if "onnxruntime" in c["subject"]]
    assert len({c["inputs"] for c in ran}) == 3
    assert all(c["passed"] for c in ran)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    other = ZOO[name].inputs(batch=3)
    with torch.no_grad(), quiet():
        after = result.module(*other.args, **other.kwargs)
        before = model(*other.args, **other.kwargs)
    assert type(after) is type(before)
    assert [t.shape for t in pytree.tree_leaves(after)] == [t.shape for t in pytree.tree_leaves(before)]

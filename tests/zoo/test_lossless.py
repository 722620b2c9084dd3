"""Run the lossless passes over the sixty models: the same outputs in float64, nothing left to do, no group lost."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.pipeline import Pipeline
from graphopt.testing import try_pass
from graphopt.verify import difference, evaluate
from tests.zoo import ZOO, cast, in_float64, quiet
from tests.zoo.captured import MODELS

pytestmark = pytest.mark.zoo

BEFORE_PRUNING = "remove-identities{trainable=true},fold-constants{trainable=true},merge-duplicates"
"""What keeps training intact, and every group free."""

AFTER_PRUNING = "remove-identities,fold-batch-norm,fold-scale,fold-constants,merge-duplicates"
"""What a deployment wants."""


@lru_cache(maxsize=1)
def captured_double(name: str) -> Graph:
    """Capture a model of the zoo in float64, also where it asks for float32: folded constants are in its type."""
    model = ZOO[name].build().double()
    with quiet(), in_float64():
        return capture(model, cast(ZOO[name].inputs(), torch.float64))


@pytest.mark.parametrize("text", [BEFORE_PRUNING, AFTER_PRUNING], ids=["before pruning", "after pruning"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_and_once_is_enough(name: str, text: str) -> None:
    graph = captured_double(name)
    args, kwargs = graph.example_inputs
    expected = evaluate(graph, args, kwargs)
    groups = [group.size for group in infer(graph).groups]
    after = graph
    for each in Pipeline.parse(text):
        trial = try_pass(each, after)
        after = trial.after
        found = evaluate(after, args, kwargs)
        assert difference(expected, found, double=True).relative <= 1e-10, each.name
        assert trial.again().unchanged, each.name
    if text == BEFORE_PRUNING:
        assert len(infer(after).groups) >= len(groups)
        assert len(list(after.nodes)) <= len(list(graph.nodes))
        assert not infer(after).groups or sorted(g.size for g in infer(after).groups)[-1] == max(groups)

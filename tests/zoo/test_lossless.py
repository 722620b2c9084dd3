"""Run the lossless passes over the sixty models: the same outputs in float64, nothing left to do, no group lost."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
import torch

from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import RemoveConstantChannels, RemoveIdentities
from graphopt.pipeline import Context, Pipeline
from graphopt.rewrite import rewrite
from graphopt.testing import try_pass
from graphopt.verify import difference, evaluate
from tests.passes.test_remove_constant_channels import silence
from tests.zoo import ZOO, cast, in_float64, quiet
from tests.zoo.captured import MODELS

pytestmark = pytest.mark.zoo

BEFORE_PRUNING = "remove-identities{trainable=true},fold-constants{trainable=true},merge-duplicates"
"""What keeps training intact, and every group free."""

AFTER_PRUNING = (
    "remove-identities,fold-batch-norm,merge-branches,merge-consecutive,fold-scale,fold-constants,merge-duplicates,"
    "merge-parallel"
)
"""What a deployment wants."""

APART_AND_TOGETHER = "split-parallel,merge-parallel{convolutions=true}"
"""What makes packed projections free of each other, and packs whatever can be."""

TEXTS = (BEFORE_PRUNING, AFTER_PRUNING, APART_AND_TOGETHER)


@lru_cache(maxsize=1)
def captured_double(name: str) -> Graph:
    """Capture a model of the zoo in float64, also where it asks for float32: folded constants are in its type."""
    model = ZOO[name].build().double()
    with quiet(), in_float64():
        return capture(model, cast(ZOO[name].inputs(), torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_and_once_is_enough(name: str) -> None:
    graph = captured_double(name)
    groups = [group.size for group in infer(graph).groups]
    expected = evaluate(graph, *graph.example_inputs)
    for text in TEXTS:
        stages = [graph]
        for each in Pipeline.parse(text):
            trial = try_pass(each, stages[-1])
            stages.append(trial.after)
            assert trial.again().unchanged, each.name
        if apart(expected, stages[-1]) > 1e-10:  # only then ask each pass
            worst = {
                each.name: apart(expected, stage) for each, stage in zip(Pipeline.parse(text), stages[1:], strict=True)
            }
            pytest.fail(f"{text}: {worst}")
        if text == BEFORE_PRUNING:
            found = [group.size for group in infer(stages[-1]).groups]
            assert len(found) >= len(groups)
            assert max(found, default=0) == max(groups, default=0)
            assert len(list(stages[-1].nodes)) <= len(list(graph.nodes))


def apart(expected: Any, graph: Graph) -> float:
    return difference(expected, evaluate(graph, *graph.example_inputs), double=True).relative


@pytest.mark.parametrize("name", MODELS)
def test_silent_channels_go_without_a_trace(name: str) -> None:
    """Put zeros in three of ten rows and scales and in two of ten columns, and remove what that made superfluous."""
    model = silence(ZOO[name].build(), seed=0)
    with quiet(), in_float64():
        graph = capture(model, cast(ZOO[name].inputs(), torch.float64))
    args, kwargs = graph.example_inputs
    context = Context(original=CostModel(infer(graph)).cost())
    result = RemoveConstantChannels().run(graph.clone(), context)
    assert context.sites
    if result.removal is not None:
        after = rewrite(result.removal.typing, result.removal.keep)
        expected = evaluate(graph, args, kwargs)
        assert difference(expected, evaluate(after, args, kwargs), double=True).relative <= 1e-10


@pytest.mark.parametrize("name", [p for p in MODELS if p.id in ("repvgg_a2", "mobileone_s1")])
def test_branches_are_merged_as_their_authors_merge_them(name: str) -> None:
    """Compare with timm's own re-parameterisation of RepVGG and MobileOne, operator by operator."""
    from timm.utils.model import reparameterize_model

    graph = captured_double(name)
    after = graph
    for each in Pipeline.parse("remove-identities,fold-batch-norm,merge-branches,fold-scale,remove-identities"):
        after = try_pass(each, after).after
    model = reparameterize_model(ZOO[name].build().double())
    theirs = try_pass(RemoveIdentities(), capture(model, cast(ZOO[name].inputs(), torch.float64))).after

    def operators(of: Graph) -> Counter[str]:
        return Counter(str(node.target).removesuffix("_") for node in of.nodes if node.op == "call_function")

    assert operators(after) == operators(theirs)
    assert sum(t.numel() for t in after.tensors().values()) == sum(t.numel() for t in theirs.tensors().values())
    args, kwargs = graph.example_inputs
    assert difference(evaluate(theirs, args, kwargs), evaluate(after, args, kwargs), double=True).relative <= 1e-10

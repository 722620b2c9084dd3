"""Check that the lossless passes keep what random ONNX models compute, and have nothing left to do a second time."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, note, settings

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.passes import (
    FoldBatchNorm,
    FoldConstants,
    FoldScale,
    MergeBranches,
    MergeConsecutive,
    MergeDuplicates,
    MergeParallel,
    RemoveConstantChannels,
    SplitParallel,
)
from graphopt.pipeline import Pass
from graphopt.testing import try_pass
from tests.random_onnx import onnx_models

PASSES: tuple[Pass, ...] = (
    FoldConstants(),
    MergeDuplicates(),
    FoldBatchNorm(),
    FoldScale(),
    SplitParallel(),
    MergeParallel(convolutions=True),
    MergeConsecutive(),
    MergeBranches(),
    RemoveConstantChannels(),
)


def check_sources(graph: Graph) -> None:
    """Compare what each tensor stands for with its sizes, position by position: plans speak of the file's tensors."""
    for name, tensor in graph.tensors().items():
        for dim, size in enumerate(tensor.shape):
            for source in graph.stands_for(name, dim):
                assert len(source.positions) == size
                assert source.positions.max(initial=-1) < source.shape[source.dim]


@pytest.mark.parametrize("each", PASSES, ids=lambda each: str(each.name))
@settings(max_examples=25)
@given(onnx_models())
def test_each_pass_keeps_what_a_model_computes(each: Pass, model: onnx.ModelProto) -> None:
    graph = capture(model)
    note(graph.text())
    done = try_pass(each, graph)
    assert done.difference() < 1e-9
    assert done.again().unchanged
    check_sources(done.after)


@settings(max_examples=25)
@given(onnx_models())
def test_all_in_a_row_keep_what_a_model_computes(model: onnx.ModelProto) -> None:
    graph = start = capture(model)
    note(graph.text())
    for each in PASSES:
        done = try_pass(each, graph)
        assert done.difference() < 1e-9
        graph = done.after
        check_sources(graph)
    assert len(graph.nodes) <= 2 * len(start.nodes)
    assert try_pass(FoldConstants(), graph).unchanged

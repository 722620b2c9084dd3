"""Prune random graphs and compare them with their masked originals."""

from __future__ import annotations

from hypothesis import given, note

from tests.dialects.checks import check
from tests.random_graphs import Sample, samples


@given(samples())
def test_a_pruned_graph_equals_its_masked_original(sample: Sample) -> None:
    """Without exception, for every group alone and for all together, with either batch, whatever the operators are."""
    note(repr(sample))
    check(sample.module, sample.inputs, [sample.other])

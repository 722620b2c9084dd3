"""The tables of the ONNX dialect: every operator by itself, on parameters and on values that do not vanish."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.dialects import infer
from graphopt.dialects.onnx import ENTRIES, OPERATORS
from graphopt.dialects.onnx.operators import op
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs
from tests.dialects.alone import assert_zero, variants
from tests.dialects.checks import EXACT, draw
from tests.dialects.onnx.samples import RANDOM, SAMPLES, UNSAMPLED, Sample

CALLS = [
    pytest.param(key, sample, id=f"{key}-{i}") for key, samples in SAMPLES.items() for i, sample in enumerate(samples)
]


def test_every_entry_has_a_sample_or_a_reason() -> None:
    assert set(ENTRIES) - set(SAMPLES) == set(UNSAMPLED)
    assert set(SAMPLES) <= set(ENTRIES)


def test_every_entry_is_an_operator() -> None:
    assert {target.key for target in OPERATORS} == set(ENTRIES)


@pytest.mark.parametrize(("key", "sample"), CALLS)
def test_an_operator_by_itself(key: str, sample: Sample) -> None:
    """Its rule gives axes of the result's sizes, what it calls zero is zero, and its rewritten calls are right."""
    for turn, (graph, call) in enumerate(variants(op(key), sample)):
        typing = infer(graph)
        assert typing.unknown == [], "the rule does not fit"
        if turn == 0:
            assert len(typing.groups) == sample.groups
        rng = np.random.default_rng(turn)
        alone = [{g.atom: np.arange(0, g.size, 2)} for g in typing.groups if g.least <= (g.size + 1) // 2]
        for keep in [*alone, draw(typing.groups, rng), draw(typing.groups, rng, single=True)]:
            if len(keep) == 1 and not any(g.normalised for g in typing.groups if g.atom in keep):
                assert_zero(typing, call, keep)
            if key not in RANDOM:
                expected = masked_outputs(typing, keep, (), {}, double=True)
                pruned = rewrite(typing, keep)
                gap = difference(expected, evaluate(pruned, (), {}, double=True), double=True)
                assert gap.relative < EXACT, f"{keep}: {gap}\n{pruned.text()}"

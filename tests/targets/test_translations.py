"""Run every translation in ONNX Runtime against the operator itself, for two sizes of the first dimension.

The calls of a family are one ONNX model: it is checked for form, types and shapes, loaded once, and run twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from graphopt.verify import difference

from .cases import FAMILIES, Call
from .single import call_inputs, eager, lowered, tensors, together

CALLS: list[tuple[str, int, Call]] = [
    (family, i, call) for family, calls in FAMILIES.items() for i, call in enumerate(calls())
]


@dataclass
class Outcome:
    """What a family's calls yielded in ONNX Runtime, in order, for three rows and for five."""

    few: list[list[torch.Tensor]]
    many: list[list[torch.Tensor]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    found = {}
    for family in FAMILIES:
        graph, parts = together([call for name, _, call in CALLS if name == family])
        _, run = lowered(graph, tmp_path_factory.mktemp(family))
        runs: list[Any] = [run(call_inputs(graph, more)) for more in (False, True)]
        found[family] = Outcome(*([results[part] for part in parts] for results in runs))
    return found


@pytest.mark.parametrize(("family", "position", "call"), CALLS, ids=[f"{family}-{c[0]}" for family, _, c in CALLS])
def test_translation_computes_what_the_operator_does(
    family: str, position: int, call: Call, outcomes: dict[str, Outcome]
) -> None:
    target, args, kwargs = call
    for more, results in ((False, outcomes[family].few), (True, outcomes[family].many)):
        expected = list(tensors(eager(target, args, kwargs, more)))
        found = results[position]
        assert found
        assert [t.dtype for t in found] == [t.dtype for t in expected[: len(found)]]
        worst = difference(expected[: len(found)], found, double=False)
        assert worst.relative <= 2e-5, worst

"""Positions of the largest entries are counted anew among the experts that stay."""

from __future__ import annotations

import numpy as np

from graphopt.dialects import infer
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs
from tests.onnx_models import graph_of

ROUTER = """
    a = MatMul(x, gate)
    p = Softmax<axis=-1>(a)
    v, i = TopK<axis=-1>(p, two)
    b = Gather<axis=0>(table, i)
    w = Unsqueeze(v, last)
    c = Mul(b, w)
    d = ReduceSum<keepdims=0>(c, second)
    y = MatMul(d, out)
"""


def test_experts_of_a_router_can_go() -> None:
    weights = {
        "gate": (3, 8),
        "table": (8, 6),
        "out": (6, 2),
        "two": np.array([2]),
        "last": np.array([-1]),
        "second": np.array([1]),
    }
    typing = infer(graph_of("(float[N,3] x) => (float[N,2] y)", ROUTER, weights))
    experts, width = typing.groups
    assert {str(place) for place in experts.places} == {"gate[1]", "table[0]"}
    assert (experts.size, experts.least, experts.role) == (8, 2, "experts")
    assert {str(place) for place in width.places} == {"table[1]", "out[0]"}
    args, kwargs = typing.graph.example_inputs
    for kept in ([0, 3, 4, 7], [1, 5]):
        keep = {experts.atom: np.array(kept), width.atom: np.array([0, 2, 5])}
        expected = masked_outputs(typing, keep, args, kwargs, double=True)
        found = evaluate(rewrite(typing, keep), args, kwargs, double=True)
        assert difference(expected, found, double=True).relative < 1e-9

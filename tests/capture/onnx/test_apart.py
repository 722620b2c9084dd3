"""What an exporter shared because it is equal is held once for each reader, so that groups are not tied by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_equivalence
from tests.onnx_models import graph_of, parsed

NORMS = """
    a = Conv<kernel_shape=[1, 1]>(x, first)
    b = InstanceNormalization(a, ones, nulls)
    c = Conv<kernel_shape=[1, 1]>(b, second)
    d = InstanceNormalization(c, ones, nulls)
    y = Conv<kernel_shape=[1, 1]>(d, third)
"""
HEAD = "(float[N,3,5,5] x) => (float[N,2,5,5] y)"


def norms(ones: str, scale: np.ndarray) -> dict[str, object]:
    return {
        "first": (6, 3, 1, 1),
        "second": (6, 6, 1, 1),
        "third": (2, 6, 1, 1),
        ones: scale,
        "nulls": np.zeros(6, np.float32),
    }


def test_equal_entries_do_not_tie_their_readers() -> None:
    graph = graph_of(HEAD, NORMS, norms("ones", np.ones(6, np.float32)))
    typing = infer(graph)
    assert [{str(p) for p in g.places} for g in typing.groups] == [
        {"first[0]", "ones[0]", "nulls[0]", "second[1]"},
        {"second[0]", "ones_1[0]", "nulls_1[0]", "third[1]"},
    ]
    keep = {g.atom: np.array([0, 2, 5][: 3 - i]) for i, g in enumerate(typing.groups)}
    assert masked_equivalence(typing, keep, rewrite(typing, keep)).equal


def test_weights_that_differ_stay_shared() -> None:
    scale = np.arange(1, 7, dtype=np.float32)
    (group,) = infer(graph_of(HEAD, NORMS, norms("ones", scale))).groups
    assert {"first[0]", "second[0]"} <= {str(p) for p in group.places}


def test_a_modules_own_tensor_stays_shared() -> None:
    model = parsed(HEAD, NORMS, norms("ones", np.ones(6, np.float32)))
    for node in model.graph.node:
        node.input[:] = [{"ones": "norm.weight", "nulls": "norm.bias"}.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = {"ones": "norm.weight", "nulls": "norm.bias"}.get(tensor.name, tensor.name)
    assert len(infer(capture(model)).groups) == 1


@pytest.mark.parametrize("made", ["Expand(zero, sizes)", "ConstantOfShape(sizes)"])
def test_a_first_state_is_made_for_each_reader(made: str) -> None:
    body = f"""
        state = {made}
        a = MatMul(x, first)
        b = Add(a, state)
        c = Relu(b)
        d = MatMul(c, second)
        e = Add(d, state)
        y = MatMul(e, third)
    """
    weights = {"first": (3, 6), "second": (6, 6), "third": (6, 2), "sizes": np.array([4, 6])}
    if "zero" in made:
        weights["zero"] = np.zeros(1, np.float32)
    graph = graph_of("(float[4,3] x) => (float[4,2] y)", body, weights)
    typing = infer(graph)
    assert len(typing.groups) == 2
    keep = {typing.groups[0].atom: np.array([1, 2, 4])}
    pruned = rewrite(typing, keep)
    args, kwargs = graph.example_inputs
    assert masked_equivalence(typing, keep, pruned).equal
    damaged = {name: t for name, t in pruned.tensors().items() if name == "second"}
    pruned.set_tensor("second", torch.nn.Parameter(damaged["second"] + 1))
    assert not difference(evaluate(graph, args, kwargs), evaluate(pruned, args, kwargs), double=False).equal

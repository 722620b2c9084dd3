"""Criteria on graphs of ONNX operators: they score what the same model scores in PyTorch, and what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.allocation import Budget
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.errors import PipelineError
from graphopt.graph import Graph
from graphopt.importance import (
    L1,
    L2,
    LAMP,
    BNGamma,
    Criterion,
    GroupTaylor,
    InputFluctuation,
    Random,
    ScoreContext,
)
from graphopt.passes.prune import PruneChannels
from graphopt.testing import try_pass
from tests.importance.test_bn_gamma import residual
from tests.importance.test_input_fluctuation import PLAIN, Heads
from tests.onnx_models import graph_of

RESIDUAL = """
    s1 = Conv(x, stem_weight, stem_bias)
    s2 = BatchNormalization(s1, stem_norm_weight, stem_norm_bias, stem_norm_running_mean, stem_norm_running_var)
    s = Relu(s2)
    u1 = Conv(s, up_weight, up_bias)
    u2 = BatchNormalization(u1, up_norm_weight, up_norm_bias, up_norm_running_mean, up_norm_running_var)
    u = Relu(u2)
    d1 = Conv(u, down_weight, down_bias)
    d2 = BatchNormalization(d1, down_norm_weight, down_norm_bias, down_norm_running_mean, down_norm_running_var)
    d = Add(s, d2)
    m = ReduceMean <keepdims = 0> (d, places)
    h1 = Gemm <transB = 1> (m, hidden_weight, hidden_bias)
    h = Relu(h1)
    y = Gemm <transB = 1> (h, head_weight, head_bias)
"""


def twins() -> tuple[Graph, Graph]:
    """Return a residual network in double precision, of ATen's operators and of ONNX's."""
    model = residual().double()
    weights: dict[str, Any] = {
        name.replace(".", "_"): value.numpy() for name, value in model.state_dict().items() if value.dim()
    }
    weights["places"] = np.array([2, 3])
    head = "(double[N,2,6,6] x) => (double[N,3] y)"
    return capture(model, (torch.randn(2, 2, 6, 6).double(),)), graph_of(head, RESIDUAL, weights)


IMAGES = [
    (torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0])),
    (torch.randn(3, 2, 6, 6).double(), torch.arange(3)),
]


@pytest.mark.parametrize(
    "criterion",
    [
        L1(),
        L2(),
        LAMP(),
        BNGamma(),
        BNGamma("sum", "none"),
        GroupTaylor(),
        InputFluctuation(),
        InputFluctuation("ifv"),
        InputFluctuation("wifn"),
        PLAIN,
    ],
    ids=str,
)
def test_a_graph_scores_as_its_twin(criterion: Criterion) -> None:
    found = []
    for graph in twins():
        context = ScoreContext(infer(graph), IMAGES)
        found.append({group.replace(".", "_"): s for group, s in criterion.score(context).items()})
    torch_scores, onnx_scores = found
    assert onnx_scores.keys() == torch_scores.keys()
    for group, scores in torch_scores.items():
        assert onnx_scores[group] == pytest.approx(scores, rel=1e-9), group
        assert np.ptp(scores) > 0


def test_chance_ranks_the_groups_of_a_file() -> None:
    _, graph = twins()
    scores = Random(seed=1).score(ScoreContext(infer(graph)))
    assert {group: len(s) for group, s in scores.items()} == {
        "stem_weight[0]": 4,
        "up_weight[0]": 6,
        "hidden_weight[0]": 5,
    }
    assert all(np.isfinite(s).all() for s in scores.values())


def test_batch_norms_in_a_file_are_needed() -> None:
    weights = {"f": (6, 2, 1, 1), "b": (6,), "w": (3, 6, 1, 1)}
    graph = graph_of("(float[N,2,5,5] x) => (float[N,3,5,5] y)", "h = Conv(x, f, b) y = Conv(h, w)", weights)
    with pytest.raises(PipelineError, match="needs a group with a batch norm that has a weight; the graph has 0"):
        BNGamma().score(ScoreContext(infer(graph)))


# Shape of x, what makes h of it, what reads tanh(h), the shapes of the weights, the group's dimension and the outputs'.
FRONT_IMAGES = ("N,2,7,6", "h = Conv(x, f)", {"f": (6, 2, 2, 2)}, 1)
FRONT_TOKENS = ("N,5,4", "h = MatMul(x, f)", {"f": (4, 6)}, -1)
CASES: dict[str, tuple[tuple[str, str, dict[str, Any], int], str, dict[str, Any], int]] = {
    "Conv": (
        FRONT_IMAGES,
        "y = Conv <pads = [1, 0, 2, 1], strides = [1, 2], dilations = [2, 1]> (t, w, b)",
        {"w": (3, 6, 3, 2), "b": (3,)},
        1,
    ),
    "Conv, same upper": (
        FRONT_IMAGES,
        'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 1]> (t, w)',
        {"w": (3, 6, 2, 3)},
        1,
    ),
    "Conv, same lower": (FRONT_IMAGES, 'y = Conv <auto_pad = "SAME_LOWER"> (t, w)', {"w": (3, 6, 2, 2)}, 1),
    "FusedConv": (FRONT_IMAGES, "y = com.microsoft.FusedConv(t, w)", {"w": (3, 6, 2, 2)}, 1),
    "ConvTranspose": (
        FRONT_IMAGES,
        "y = ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 1], output_padding = [1, 0]> (t, w)",
        {"w": (6, 3, 3, 4)},
        1,
    ),
    "ConvTranspose to a shape": (
        FRONT_IMAGES,
        "y = ConvTranspose <strides = [2, 2], output_shape = [13, 11]> (t, w)",
        {"w": (6, 3, 3, 3)},
        1,
    ),
    "MatMul": (FRONT_TOKENS, "y = MatMul(t, w)", {"w": (6, 3)}, -1),
    "MatMul with a weight that is computed": (
        FRONT_TOKENS,
        "e = Exp(w) s = Transpose(e) y = MatMul(t, s)",
        {"w": (3, 6)},
        -1,
    ),
    "MatMul from the left": (
        ("N,4,5", "h = MatMul(f, x)", {"f": (6, 4)}, -2),
        "y = MatMul(w, t)",
        {"w": (3, 6)},
        -2,
    ),
    "MatMul with a vector": (FRONT_TOKENS, "z = MatMul(t, w) y = Unsqueeze(z, last)", {"w": (6,), "last": [-1]}, -1),
    "FusedMatMul": (
        FRONT_TOKENS,
        "y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (t, w)",
        {"w": (3, 6)},
        -1,
    ),
    "Gemm": (
        ("N,4", "h = Gemm <transB = 1> (x, f)", {"f": (6, 4)}, -1),
        "y = Gemm <transB = 1, alpha = 1.5, beta = 0.5> (t, w, b)",
        {"w": (3, 6), "b": (3,)},
        -1,
    ),
    "Gemm of what is turned": (
        ("N,4", "s = Transpose(x) h = MatMul(f, s)", {"f": (6, 4)}, 0),
        "y = Gemm <transA = 1> (t, w)",
        {"w": (6, 3)},
        -1,
    ),
    "Gemm with the weight on the left": (
        ("N,4", "s = Transpose(x) h = MatMul(f, s)", {"f": (6, 4)}, 0),
        "y = Gemm <transA = 1> (w, t)",
        {"w": (6, 3)},
        0,
    ),
}


def case(name: str) -> tuple[Graph, Graph, Graph]:
    """Return the whole graph, the part that makes what is read, and the part that reads it."""
    (shape, front, given, _), back, weights, _ = CASES[name]
    rank = shape.count(",") + 1
    h, y = (",".join(f"{c}{d}" for d in range(rank)) for c in "hy")
    whole = graph_of(f"(double[{shape}] x) => (double[{y}] y)", f"{front} t = Tanh(h) {back}", given | weights)
    values = {name: tensor.detach().numpy() for name, tensor in whole.tensors().items()}
    first = graph_of(f"(double[{shape}] x) => (double[{h}] t)", f"{front} t = Tanh(h)", {n: values[n] for n in given})
    seen = ",".join(map(str, first.run(first.example_inputs[0][0]).shape))
    last = {n: values.get(n, v) for n, v in weights.items()}
    return whole, first, graph_of(f"(double[{seen}] t) => (double[{y}] y)", back, last)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_score_is_the_error_of_deleting_a_column_and_keeping_its_mean(name: str) -> None:
    torch.manual_seed(0)
    (_, _, _, dim), _, _, out = CASES[name]
    whole, front, back = case(name)
    x = torch.randn_like(whole.example_inputs[0][0])
    hidden = front.run(x)
    expected = []
    for index in range(hidden.shape[dim]):
        cut = hidden.clone()
        cut.select(dim, index).zero_()
        change = (back.run(hidden) - back.run(cut)).movedim(out, -1).flatten(0, -2)
        expected.append(float((change - change.mean(0)).square().mean(0).sum()))
    typing = infer(whole)
    (group,) = [g for g in typing.groups if g.size == 6]
    assert PLAIN.score(ScoreContext(typing, [x]))[group.name] == pytest.approx(expected, rel=1e-10)


@torch.no_grad()
def test_query_widths_of_flat_attention_score_as_in_torch() -> None:
    torch.manual_seed(0)
    model, x = Heads(fused=True).double(), torch.randn(9, 7, 6).double()
    body = " ".join(
        [f"{n}0 = MatMul(x, {n}_weight) {n} = Add({n}0, {n}_bias)" for n in "qkv"]
        + [
            "m = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)",
            "y0 = MatMul(m, proj_weight) y = Add(y0, proj_bias)",
        ]
    )
    weights: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        weights[name.replace(".", "_")] = (value.mT if value.dim() == 2 else value).numpy()
    graph = graph_of("(double[N,7,6] x) => (double[N,7,6] y)", body, weights, opset=23)
    torch.testing.assert_close(graph.run(x), model(x))
    found = [scores_by_role(infer(each), x) for each in (capture(model, (x,)), graph)]
    assert found[0].keys() == found[1].keys()
    for role, scores in found[0].items():
        assert found[1][role] == pytest.approx(scores, rel=1e-10), role


def scores_by_role(typing: Typing, x: Tensor) -> dict[str, Any]:
    scores = PLAIN.score(ScoreContext(typing, [x]))
    found: dict[str, Any] = {}
    for group in typing.groups:
        assert group.role not in found
        found[group.role] = scores[group.name]
    return found


def test_a_file_is_pruned_by_what_its_gradients_and_activations_say() -> None:
    for criterion in (GroupTaylor(), InputFluctuation()):
        _, graph = twins()
        each = PruneChannels(importance=criterion, budget=Budget(flops=0.6))
        trial = try_pass(each, graph, calibration=[(x.numpy(), y.numpy()) for x, y in IMAGES])
        assert trial.cost.flops <= 0.6 * trial.context.original.flops
        assert trial.difference() < 1e-9
        assert trial.notices_damage()
        assert all(p.grad is None for p in graph.module.parameters())

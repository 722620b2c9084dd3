"""Check that weights stored as whole numbers are scored by what they stand for, and pruned with their scales."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphopt
from graphopt import Budget
from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.dialects.onnx.quantized import is_quantized, real_value
from graphopt.importance.criterion import ScoreContext
from graphopt.importance.l2 import L2

RANDOM = np.random.default_rng(5)

BODY = """
    q = QuantizeLinear (x, step, middle)
    d = DequantizeLinear (q, step, middle)
    w = DequantizeLinear <axis = 0> (weight, scale, zero)
    b = DequantizeLinear <axis = 0> (bias, bias_scale)
    y = Conv (d, w, b)
    r = Relu (y)
    p = QuantizeLinear (r, step, middle)
    e = DequantizeLinear (p, step, middle)
    v = DequantizeLinear (other, one_scale, none)
    out = Conv (e, v)
"""


def model(*, per_channel: bool, zero: int = 0) -> Any:
    count = 12
    text = f'<ir_version: 9, opset_import: ["": 19]> net (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] out) {{ {BODY} }}'
    made = onnx.parser.parse_model(text)
    scales = np.linspace(0.01, 0.2, count, dtype=np.float32) if per_channel else np.float32(0.05)
    tensors = {
        "step": np.float32(0.05),
        "middle": np.uint8(128),
        "weight": RANDOM.integers(-127, 128, (count, 3, 1, 1), dtype=np.int8),
        "scale": scales,
        "zero": np.full(np.shape(scales), zero, np.int8),
        "bias": RANDOM.integers(-50, 50, count, dtype=np.int32),
        "bias_scale": np.asarray(scales * np.float32(0.05), np.float32),
        "other": RANDOM.integers(-127, 128, (4, count, 1, 1), dtype=np.int8),
        "one_scale": np.float32(0.01),
        "none": np.int8(0),
    }
    for name, value in tensors.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("per_channel", [False, True])
def test_whole_numbers_are_parameters_that_go_with_their_scales(per_channel: bool) -> None:
    result = graphopt.optimize(model(per_channel=per_channel), target="onnx", budget=Budget(flops=0.7))
    assert result.report.after.flops <= 0.7 * result.report.before.flops
    assert all(comparison.passed for comparison in result.report.comparisons)
    assert not result.report.warnings
    assert any("operator by operator" in note for note in result.report.notes)
    kept = result.plan.keep["weight"][0]
    np.testing.assert_array_equal(result.plan.keep["other"][1], kept)
    assert ("scale" in result.plan.keep) == per_channel
    tensors = {each.name: numpy_helper.to_array(each) for each in result.onnx.graph.initializer}
    assert tensors["weight"].dtype == np.int8
    assert tensors["weight"].shape == (len(kept), 3, 1, 1)


def test_they_are_scored_by_the_numbers_they_stand_for() -> None:
    given = model(per_channel=True)
    tensors = {each.name: numpy_helper.to_array(each) for each in given.graph.initializer}
    graph = capture(given)
    assert isinstance(graph.tensor("weight"), nn.Parameter)
    assert not isinstance(graph.tensor("scale"), nn.Parameter)
    real = tensors["weight"] * tensors["scale"][:, None, None, None]
    torch.testing.assert_close(real_value(graph, "weight"), torch.from_numpy(real))
    (scores,) = L2().score(ScoreContext(infer(graph))).values()
    expected = (
        (real.reshape(12, -1) ** 2).sum(1)
        + (tensors["bias"] * tensors["bias_scale"]) ** 2
        + ((tensors["other"] * tensors["one_scale"]).astype(np.float64) ** 2).sum((0, 2, 3))
    )
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(expected))


def test_numbers_around_another_zero_stay_whole() -> None:
    """Setting them to the number 0 would not take a channel away, and the report says that nothing may shrink."""
    graph = capture(model(per_channel=True, zero=3))
    assert not isinstance(graph.tensor("weight"), nn.Parameter)


def test_what_is_quantized() -> None:
    assert is_quantized(capture(model(per_channel=False)))
    plain = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> n (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    assert not is_quantized(capture(plain))

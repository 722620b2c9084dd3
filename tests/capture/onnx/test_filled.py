"""Test tensors that are filled with one number: ConstantOfShape of sizes that vary."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphopt.capture import capture
from graphopt.dialects.onnx.write import write
from graphopt.errors import CaptureError
from graphopt.targets.lowering.storage import embed

from .files import model, value


def _filled(kind: int, number: float, dims: tuple[int, ...] = (1,)) -> onnx.ModelProto:
    filling = helper.make_tensor("", kind, dims, [number] * (dims[0] if dims else 1))
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], name="shape"),
        helper.make_node("ConstantOfShape", ["sizes"], ["z"], name="filled", value=filling),
    ]
    return model(nodes, outputs=[value("z", ("n", 4), kind)], initializers=[], opset=20)


@pytest.mark.parametrize(
    ("kind", "number", "dtype"),
    [
        (TensorProto.FLOAT, 2.5, torch.float32),
        (TensorProto.FLOAT, float("-inf"), torch.float32),
        (TensorProto.INT64, 2**62, torch.int64),
        (TensorProto.BOOL, True, torch.bool),
        (TensorProto.BFLOAT16, 1.5, torch.bfloat16),
        (TensorProto.FLOAT16, 0.5, torch.float16),
    ],
)
@pytest.mark.parametrize("dims", [(1,), ()])
def test_a_filled_tensor_is_run_and_written(
    kind: int, number: float, dtype: torch.dtype, dims: tuple[int, ...]
) -> None:
    graph = capture(_filled(kind, number, dims))
    found = graph.run(torch.zeros(3, 4))
    assert (found.dtype, found.shape) == (dtype, (3, 4))
    assert torch.equal(found, torch.full((3, 4), number, dtype=dtype))
    written = write(graph)
    again = capture(embed(written.skeleton, written.weights))
    assert torch.equal(again.run(torch.zeros(2, 4)), torch.full((2, 4), number, dtype=dtype))


def test_a_filling_of_several_numbers_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"node 'filled' \(ConstantOfShape\).*shape \[3\].*one number must stand"):
        capture(_filled(TensorProto.FLOAT, 1.0, (3,)))

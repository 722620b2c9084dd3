"""Make ONNX models for the tests of reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def weight(name: str = "w", shape: Sequence[int] = (4, 3)) -> TensorProto:
    values = np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)
    return numpy_helper.from_array(values, name)


def value(name: str, shape: Sequence[Any] | None = ("n", 4), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[onnx.NodeProto] | None = None,
    *,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    initializers: Sequence[TensorProto] | None = None,
    opset: int = 18,
    ir_version: int = 9,
    imports: Sequence[tuple[str, int]] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """Return a linear layer and a ReLU, or what is given in place of their parts."""
    if nodes is None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="linear"),
            helper.make_node("Relu", ["y"], ["z"], name="relu"),
        ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x")] if inputs is None else inputs,
        [value("z", ("n", 3))] if outputs is None else outputs,
        [weight()] if initializers is None else initializers,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*each) for each in imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)

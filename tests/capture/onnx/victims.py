"""Build small models that hold much of what ONNX files hold, for tests that damage them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .files import value, weight


def _array(name: str, values: object, kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def convolutions() -> onnx.ModelProto:
    """Return a convolution, batch norm, pooling, and a classifier behind a Reshape to computed sizes."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1], group=1),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="norm", epsilon=1e-5),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Shape", ["p"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], name="batch", axis=0),
        helper.make_node("Unsqueeze", ["batch", "first"], ["batch1"], name="unsqueeze"),
        helper.make_node("Concat", ["batch1", "rest"], ["sizes"], name="concat", axis=0),
        helper.make_node("Reshape", ["p", "sizes"], ["flat"], name="reshape"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
    ]
    initializers = [
        weight("conv.weight", (6, 3, 3, 3)),
        weight("conv.bias", (6,)),
        *(weight(name, (6,)) for name in "gbm"),
        _array("v", [1.0] * 6, np.float32),
        _array("zero", 0),
        _array("first", [0]),
        _array("rest", [-1]),
        weight("fc.weight", (5, 54)),
        weight("fc.bias", (5,)),
    ]
    graph = helper.make_graph(nodes, "convolutions", [value("x", ("n", 3, 6, 6))], [value("y", ("n", 5))], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")


def attention() -> onnx.ModelProto:
    """Return two heads of attention, layer norm, and a quantized linear layer."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "ln.w", "ln.b"], ["h"], name="ln", axis=-1),
        helper.make_node("MatMul", ["h", "qkv"], ["packed"], name="qkv"),
        helper.make_node("Split", ["packed", "thirds"], ["q", "k", "v"], name="split", axis=2),
    ]
    for name in "qkv":
        nodes += [
            helper.make_node("Reshape", [name, "heads"], [f"{name}4"], name=f"{name}.view"),
            helper.make_node(
                "Transpose", [f"{name}4"], [f"{name}t"], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
            ),
        ]
    nodes += [
        helper.make_node("MatMul", ["qt", "kt"], ["scores"], name="scores"),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"], name="scale"),
        helper.make_node("Softmax", ["scaled"], ["p"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["p", "vt"], ["o"], name="values"),
        helper.make_node("Transpose", ["o"], ["ot"], name="back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ot", "flat"], ["of"], name="merge"),
        helper.make_node("QuantizeLinear", ["of", "s", "z"], ["oq"], name="quantize"),
        helper.make_node("DequantizeLinear", ["oq", "s", "z"], ["od"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["wd"], name="weights", axis=1),
        helper.make_node("MatMul", ["od", "wd"], ["y0"], name="out"),
        helper.make_node("Constant", [], ["one"], name="one", value=_array("", [1.0], np.float32)),
        helper.make_node("Add", ["y0", "one"], ["y1"], name="shift"),
        helper.make_node("Add", ["x", "y1"], ["y"], name="residual"),
    ]
    initializers = [
        weight("ln.w", (8,)),
        weight("ln.b", (8,)),
        weight("qkv", (8, 24)),
        _array("thirds", [8, 8, 8]),
        _array("heads", [0, 0, 2, 4]),
        _array("flat", [0, 0, 8]),
        _array("scale", 0.5, np.float32),
        _array("s", 0.1, np.float32),
        _array("z", 3, np.uint8),
        _array("w8", np.arange(64).reshape(8, 8) - 32, np.int8),
        _array("ws", np.linspace(0.1, 0.2, 8), np.float32),
        _array("wz", [0] * 8, np.int8),
    ]
    graph = helper.make_graph(nodes, "attention", [value("x", ("n", 5, 8))], [value("y", ("n", 5, 8))], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def straight() -> onnx.ModelProto:
    """Return a function of the model's own, called twice, a sparse initializer, and shapes filled with numbers."""
    nodes = [
        helper.make_node("Scaled", ["x"], ["s"], name="call", domain="local"),
        helper.make_node("Scaled", ["s"], ["s2"], name="call2", domain="local"),
        helper.make_node("Shape", ["s2"], ["sizes"], name="shape"),
        helper.make_node("ConstantOfShape", ["sizes"], ["filled"], name="filled", value=_array("", [2.0], np.float32)),
        helper.make_node("Expand", ["sparse", "sizes"], ["wide"], name="expand"),
        helper.make_node("Tile", ["wide", "times"], ["tiled"], name="tile"),
        helper.make_node("Slice", ["tiled", "starts", "ends", "axes", "steps"], ["cut"], name="slice"),
        helper.make_node("Pad", ["cut", "pads", "nought"], ["padded"], name="pad"),
        helper.make_node("Range", ["first", "last", "delta"], ["ramp"], name="range"),
        helper.make_node("Cast", ["ramp"], ["cast"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["s2", "filled"], ["a"], name="add"),
        helper.make_node("Concat", ["a", "padded"], ["both"], name="concat", axis=1),
        helper.make_node("Add", ["both", "cast"], ["y"], name="add2"),
    ]
    function = helper.make_function(
        "local",
        "Scaled",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["two"], value=_array("", [2.0], np.float32)),
            helper.make_node("Mul", ["a", "two"], ["b"]),
        ],
        [helper.make_opsetid("", 18)],
    )
    initializers = [
        _array("times", [1, 3]),
        _array("starts", [1]),
        _array("ends", [9]),
        _array("axes", [1]),
        _array("steps", [2]),
        _array("pads", [0, 1, 0, 1]),
        _array("nought", 0.0, np.float32),
        *(_array(name, n) for name, n in (("first", 0), ("last", 10), ("delta", 1))),
    ]
    graph = helper.make_graph(nodes, "straight", [value("x")], [value("y", ("n", 10))], initializers)
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(_array("sparse", [5.0, 6.0], np.float32), _array("at", [1, 3]), [4])
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
        functions=[function],
        ir_version=9,
    )


def control() -> onnx.ModelProto:
    """Return an If and a Loop, a function of the model's own, a sparse initializer, a shape filled with a number."""
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["t"], name="plus")], "then", [], [value("t", None)], []
    )
    other = helper.make_graph(
        [helper.make_node("Mul", ["x", "inner"], ["e"], name="times")],
        "else",
        [],
        [value("e", None)],
        [weight("inner", (4,))],
    )
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "i4"], ["next"], name="step"),
            helper.make_node("Identity", ["go"], ["go_on"], name="on"),
            helper.make_node("CastLike", ["i", "w"], ["i4"], name="cast"),
        ],
        "body",
        [
            value("i", (), TensorProto.INT64),
            value("go", (), TensorProto.BOOL),
            value("state", None),
        ],
        [value("go_on", (), TensorProto.BOOL), value("next", None)],
        [],
    )
    body.node.insert(0, body.node.pop())
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["positive"], name="greater"),
        helper.make_node("If", ["positive"], ["branch"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Loop", ["times", "", "branch"], ["looped"], name="loop", body=body),
        helper.make_node("Scaled", ["looped"], ["s"], name="call", domain="local"),
        helper.make_node("Scaled", ["s"], ["s2"], name="call2", domain="local"),
        helper.make_node("ConstantOfShape", ["four"], ["filled"], name="filled", value=_array("", [2.0], np.float32)),
        helper.make_node("Add", ["s2", "filled"], ["a"], name="add"),
        helper.make_node("Add", ["a", "sparse"], ["y"], name="add2"),
    ]
    function = helper.make_function(
        "local",
        "Scaled",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["two"], value=_array("", [2.0], np.float32)),
            helper.make_node("Mul", ["a", "two"], ["b"]),
        ],
        [helper.make_opsetid("", 18)],
    )
    initializers = [weight("w", (4,)), _array("limit", 0, np.float32), _array("times", 3), _array("four", [4])]
    graph = helper.make_graph(nodes, "control", [value("x")], [value("y")], initializers)
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(_array("sparse", [5.0, 6.0], np.float32), _array("at", [1, 3]), [4])
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
        functions=[function],
        ir_version=9,
    )


def old() -> onnx.ModelProto:
    """Return a model of opset 9, whose initializers are inputs, too."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="gemm", transB=0),
        helper.make_node("Clip", ["h"], ["c"], name="clip", min=0.0, max=6.0),
        helper.make_node("Unsqueeze", ["c"], ["u"], name="unsqueeze", axes=[1]),
        helper.make_node("ReduceSum", ["u"], ["s"], name="sum", axes=[1], keepdims=0),
        helper.make_node("Softmax", ["s"], ["y"], name="softmax", axis=1),
    ]
    inputs = [value("x", (2, 4)), value("w", (4, 3)), value("b", (3,))]
    graph = helper.make_graph(nodes, "old", inputs, [value("y", (2, 3))], [weight(), weight("b", (3,))])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3)


def outside(folder: Path) -> onnx.ModelProto:
    """Return the convolutions with their weights in a file of that folder."""
    onnx.save(
        convolutions(),
        folder / "outside.onnx",
        save_as_external_data=True,
        location="outside.data",
        size_threshold=64,
    )
    return onnx.load(folder / "outside.onnx", load_external_data=False)

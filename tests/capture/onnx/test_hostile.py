"""Test that models which claim absurd sizes are refused before memory is asked for, and odd names do no harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.capture import capture
from graphopt.dialects.onnx.write import write
from graphopt.errors import CaptureError, GraphOptError

from .files import model, value, weight

resource = pytest.importorskip("resource", reason="limits of memory are those of Unix")

node = helper.make_node
HUGE = 2**40
OVERFLOW = 2**62


def _array(name: str, values: Any, kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def _case(*nodes: onnx.NodeProto, weights: Any = (), inputs: Any = None, **options: Any) -> onnx.ModelProto:
    inputs = [value("x", (2, 4))] if inputs is None else inputs
    return model(nodes, initializers=weights, inputs=inputs, outputs=[value("z", None)], **options)


def _filled(*sizes: int) -> onnx.ModelProto:
    nodes = node("ConstantOfShape", ["s"], ["c"], name="culprit"), node("Add", ["x", "c"], ["z"])
    return _case(*nodes, weights=[_array("s", sizes)])


def _ranged(start: int, limit: int, step: int) -> onnx.ModelProto:
    nodes = (
        node("Range", ["a", "b", "c"], ["r"], name="culprit"),
        node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
        node("ReduceSum", ["f"], ["d"], keepdims=0),
        node("Add", ["x", "d"], ["z"]),
    )
    return _case(*nodes, weights=[_array(n, v) for n, v in zip("abc", (start, limit, step), strict=True)])


def _applied(
    operation: str, *operands: Any, shape: Any = (2, 4), opset: int = 18, **attributes: Any
) -> onnx.ModelProto:
    """Return a model of one node, whose operands behind the input are constants."""
    names = [f"o{i}" for i in range(len(operands))]
    weights = [
        _array(n, v, np.float32 if np.asarray(v).dtype.kind == "f" else np.int64)
        for n, v in zip(names, operands, strict=True)
    ]
    return _case(
        node(operation, ["x", *names], ["z"], name="culprit", **attributes),
        weights=weights,
        inputs=[value("x", shape)],
        opset=opset,
    )


CASES = {
    "ConstantOfShape": lambda: _filled(HUGE),
    "ConstantOfShape, overflow": lambda: _filled(OVERFLOW, OVERFLOW),
    "ConstantOfShape, negative": lambda: _filled(-1, 3),
    "Range": lambda: _ranged(0, HUGE, 1),
    "Range, no step": lambda: _ranged(0, HUGE, 0),
    "Range, overflow": lambda: _ranged(-OVERFLOW, OVERFLOW, 1),
    "Expand": lambda: _applied("Expand", [HUGE, 2, 4]),
    "Expand, overflow": lambda: _applied("Expand", [OVERFLOW, OVERFLOW, 2, 4]),
    "Tile": lambda: _applied("Tile", [HUGE, HUGE]),
    "Reshape": lambda: _applied("Reshape", [2**60]),
    "Reshape, negative": lambda: _applied("Reshape", [-5, 2]),
    "Pad": lambda: _applied("Pad", [HUGE] * 4),
    "Pad, negative": lambda: _applied("Pad", [-HUGE, 0, 0, 0]),
    "TopK": lambda: _case(node("TopK", ["x", "k"], ["z", "i"], name="culprit"), weights=[_array("k", [HUGE])]),
    "Slice, no step": lambda: _applied("Slice", [0], [HUGE], [0], [0]),
    "Transpose": lambda: _applied("Transpose", perm=[5, OVERFLOW]),
    "Conv, dilated": lambda: _convolved(dilations=[HUGE, HUGE], pads=[OVERFLOW] * 4),
    "Conv, no stride": lambda: _convolved(strides=[0, 0]),
    "Conv, no groups": lambda: _convolved(group=0),
    "MaxPool": lambda: _applied("MaxPool", shape=(1, 3, 8, 8), kernel_shape=[HUGE] * 2, pads=[HUGE] * 4),
    "MaxPool, no kernel": lambda: _applied("MaxPool", shape=(1, 3, 8, 8), kernel_shape=[0, 0]),
    "DepthToSpace, no blocks": lambda: _applied("DepthToSpace", shape=(1, 4, 8, 8), blocksize=0),
    "Split": lambda: _applied("Split", axis=1, num_outputs=HUGE),
    "Concat": lambda: _case(
        *[node("Concat", ["x" if i == 0 else f"c{i - 1}"] * 64, [f"c{i}" if i < 6 else "z"], axis=0) for i in range(7)]
    ),
    "Einsum": lambda: _applied("Einsum", equation="ab->abc" * 30),
    "an input": lambda: _case(node("Relu", ["x"], ["z"]), inputs=[value("x", (2**20, 2**10))]),
    "an input that varies": lambda: _case(node("Relu", ["x"], ["z"]), inputs=[value("x", ("n",) * 40)]),
}


def _convolved(**attributes: Any) -> onnx.ModelProto:
    return _case(
        node("Conv", ["x", "w"], ["z"], name="culprit", **attributes),
        inputs=[value("x", (1, 3, 8, 8))],
        weights=[weight("w", (4, 3, 3, 3))],
    )


@pytest.fixture
def _memory() -> Iterator[None]:
    """Allow one more gigabyte."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("case", CASES)
def test_absurd_sizes_are_refused(case: str) -> None:
    given = CASES[case]()
    with pytest.raises(GraphOptError) as caught:
        capture(given)
    message = str(caught.value)
    assert "memory: you tried" not in message
    if any(n.name == "culprit" for n in given.graph.node):
        assert "culprit" in message or "types that do not fit" in message or "not well formed" in message


NAMES = (
    *("training", "forward", "a.b", "a", "..", "/w:0", "__class__", "_parameters", "b.forward", "b._modules", "graph"),
    *("meta", "code", "x y", "ä.ö", "0", "import", "T_destination", "y" * 3000, "self", "x.x.x", "x.x"),
    *(
        '"',
        "\\",
        "{x}",
        "'",
        "a   b",
        "#",
        "\ufb01",
        "a.import.b",
        "1.2",
        "fi",
        "a-b",
        "a_b",
        "A",
        "Self",
        "_self",
        "fx_pytree",
    ),
)


def test_odd_names_of_weights_are_taken() -> None:
    weights = [weight(name, (4,)) for name in NAMES]
    nodes = [node("Add", [f"v{i}", name], [f"v{i + 1}" if i + 1 < len(NAMES) else "z"]) for i, name in enumerate(NAMES)]
    graph = capture(_case(*nodes, weights=weights, inputs=[value("v0", (2, 4))]))
    x = torch.randn(2, 4)
    one = torch.from_numpy(numpy_helper.to_array(weights[0]).copy())
    assert torch.allclose(graph.module(x), x + len(NAMES) * one, atol=1e-5)
    assert not graph.module.training
    assert list(write(graph).weights) == list(NAMES)


@pytest.mark.parametrize("quote", ['"', "'"])
def test_names_are_not_run_as_code(quote: str) -> None:
    name = 'w"), getattr(torch, "manual_seed")(4711), ("'.replace('"', quote)
    torch.manual_seed(1)
    named = node("Add", ["x", name], [f"{name}out"], name=f"{name}node")
    graph = capture(
        model(
            [named, node("Relu", [f"{name}out"], ["z"])],
            inputs=[value("x", (2, 4)), value(f"{name}in", (2, 4))],
            outputs=[value("z", None)],
            initializers=[weight(name, (4,))],
        )
    )
    x = torch.zeros(2, 4)
    found = graph.module(x, x)
    stored = torch.from_numpy(numpy_helper.to_array(weight("w", (4,))).copy())
    assert torch.initial_seed() == 1
    assert torch.equal(found, stored.relu().expand(2, 4))


def test_odd_names_of_inputs_are_taken() -> None:
    names = (
        "self",
        "forward",
        "import",
        "x y/z",
        "x_y_z",
        "x/y z",
        "__class__",
        "a.b",
        "1",
        "²",
        "torch",
        "self_",
        "ä",
    )
    nodes = [node("Sum", list(names), ["z"])]
    graph = capture(_case(*nodes, inputs=[value(name, (2, 4)) for name in names]))
    given = [torch.full((2, 4), float(i)) for i in range(len(names))]
    assert torch.equal(graph.module(*given), torch.full((2, 4), float(sum(range(len(names))))))


@pytest.mark.parametrize("count", [0, 2])
def test_a_constant_has_one_value(count: int) -> None:
    values: dict[str, Any] = {"value_int": 1, "value_float": 2.0}
    constant = node("Constant", [], ["c"], name="culprit", **dict(list(values.items())[:count]))
    with pytest.raises(CaptureError, match=r"node 'culprit' \(Constant\) must have one value"):
        capture(_case(constant, node("Relu", ["x"], ["z"])))


def test_a_constant_of_another_type_than_it_says_is_refused() -> None:
    constant = node("Constant", [], ["c"], name="culprit", value=_array("", [1]))
    constant.attribute[0].name = "value_ints"
    with pytest.raises(GraphOptError, match="culprit"):
        capture(_case(constant, node("Relu", ["x"], ["z"])))


def test_what_onnx_runtime_does_not_load_is_an_error_and_not_written(tmp_path: Path) -> None:
    given = _case(
        node("Conv", ["x", "w"], ["z"], name="culprit", kernel_shape=[3, 7]),
        inputs=[value("x", ("n", 3, 8, 8))],
        weights=[weight("w", (4, 3, 3, 3))],
    )
    with pytest.raises(GraphOptError, match=r"culprit|kernel_shape"):
        graphopt.optimize(given, target="onnx", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Check that ONNX models become graphs that compute the same, with types that hold for other sizes of the inputs."""

import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.dialects.onnx.facts import facts_of
from graphopt.dialects.onnx.operators import op
from graphopt.dialects.onnx.write import to_graphsurgeon, write
from graphopt.errors import CaptureError, LoweringError, UnsupportedOperatorError
from graphopt.graph import Call, Graph, tensor_spec
from graphopt.targets.lowering.storage import embed


def parsed(body: str, *, inputs: str, outputs: str, opset: int = 20, weights: dict[str, Any] | None = None) -> Any:
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, value in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model


def run(model: Any, *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)


def rebuilt(graph: Graph) -> Any:
    written = write(graph)
    model = embed(written.skeleton, written.weights)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(graph: Graph) -> Any:
    return graph.module.graph.output_node().args[0]


def assert_same(model: Any, graph: Graph, *inputs: torch.Tensor) -> None:
    """Compare the original, the graph and what is written of it, the first and the last in ONNX Runtime."""
    expected = run(model, *inputs)
    found = graph.run(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    for a, b, c in zip(expected, found, run(rebuilt(graph), *inputs), strict=True):
        np.testing.assert_allclose(b.detach().numpy(), a, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(c, a)


GENERATOR = np.random.default_rng(0)
WEIGHT = GENERATOR.standard_normal((6, 4)).astype(np.float32)


def heads(shape: str) -> Any:
    """Make a model that splits channels into heads; ``shape`` makes the value ``shape``."""
    return parsed(
        f"y = MatMul (x, w) {shape} z = Reshape (y, shape) out = Transpose <perm = [0, 2, 1, 3]> (z)",
        inputs="float[batch, time, 6] x",
        outputs="float[batch, 2, time, 2] out",
        weights={
            "w": WEIGHT,
            "zero": np.int64(0),
            "one": np.int64(1),
            "first": np.array([0]),
            "second": np.array([1]),
            "two": np.array([2]),
            "rest": np.array([2, 2]),
            "minus": np.array([-1]),
        },
    )


ARITHMETIC = {
    "copied sizes": "s = Shape (x) b = Gather (s, first) t = Gather (s, second) shape = Concat <axis = 0> (b, t, rest)",
    "of one entry": (
        "s = Shape (x) b = Gather (s, zero) t = Gather (s, one) b1 = Unsqueeze (b, first) t1 = Unsqueeze (t, first) "
        "shape = Concat <axis = 0> (b1, t1, rest)"
    ),
    "parts of a shape": "s = Shape <start = 0, end = 2> (x) shape = Concat <axis = 0> (s, two, minus)",
    "a slice": (
        "s = Shape (x) p = Slice (s, first, two) h = Cast <to = 7> (two) d = Div (h, two) e = Mul (d, two) "
        "shape = Concat <axis = 0> (p, e, two)"
    ),
    "a guard against -1": (
        "s = Shape (x) b = Gather (s, first) k = Equal (b, minus) c = Where (k, two, b) t = Gather (s, second) "
        "shape = Concat <axis = 0> (c, t, rest)"
    ),
    "an unrolled condition": (
        "s = Shape (x) n = Size (s) m = Cast <to = 7> (n) t = Gather (s, second) b = Gather (s, first) "
        "shape = Concat <axis = 0> (b, t, rest)"
    ),
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_a_reshape_is_written_with_a_constant_where_that_says_it(arithmetic: str) -> None:
    written = rebuilt(capture(heads(ARITHMETIC[arithmetic])))
    assert [node.op_type for node in written.graph.node] == ["MatMul", "Reshape", "Transpose"]


def test_successive_sizes_of_a_value_are_written_as_one_shape() -> None:
    model = parsed(
        "s = Shape (x) b = Gather (s, zero) t = Gather (s, one) shape = Concat <axis = 0> (b, t, six) "
        "out = Expand (y, shape)",
        inputs="float[n, t, 2] x, float[1, 1, 6] y",
        outputs="float[n, t, 6] out",
        weights={"zero": np.array([0]), "one": np.array([1]), "six": np.array([6])},
    )
    graph = capture(model)
    assert [node.op_type for node in rebuilt(graph).graph.node] == ["Shape", "Concat", "Expand"]
    assert_same(model, graph, torch.randn(3, 5, 2), torch.randn(1, 1, 6))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_arithmetic_on_sizes_becomes_arguments(arithmetic: str) -> None:
    model = heads(ARITHMETIC[arithmetic])
    graph = capture(model)
    names = [node.target.name for node in graph.nodes if hasattr(node.target, "domain")]
    assert names == ["MatMul", "Reshape", "Transpose"]
    (reshape,) = graph.module.graph.find_nodes(op="call_function", target=op("Reshape"))
    batch, time, *rest = Call(reshape)["shape"]
    assert [batch.target, time.target] == [torch.ops.aten.sym_size.int] * 2
    assert rest in ([2, 2], [2, -1])
    assert tensor_spec(reshape).dynamic == (True, True, False, False)
    for shape in ((2, 16, 6), (1, 3, 6), (5, 1, 6)):
        assert_same(model, graph, torch.randn(shape))


def test_arithmetic_without_varying_sizes_leaves_numbers() -> None:
    model = heads(ARITHMETIC["of one entry"])
    graph = capture(model, (torch.randn(3, 5, 6),), dynamic=None)
    (reshape,) = graph.module.graph.find_nodes(op="call_function", target=op("Reshape"))
    assert reshape.args[1] == [3, 5, 2, 2]


def test_padding_to_a_multiple_keeps_what_varies() -> None:
    """The pad is zero at the sizes tried, and must not be taken for a constant."""
    model = parsed(
        "s = Shape <start = 1, end = 2> (x) r = Mod (s, eight) q = Sub (eight, r) p = Mod (q, eight) "
        "pads = Concat <axis = 0> (none, none, none, p) out = Pad (x, pads)",
        inputs="float[1, time] x",
        outputs="float[1, padded] out",
        weights={"eight": np.array([8]), "none": np.array([0])},
    )
    graph = capture(model, (torch.randn(1, 16),))
    for time in (16, 8, 13, 1):
        assert_same(model, graph, torch.randn(1, time))


def test_a_division_rounds_as_onnx_does() -> None:
    model = parsed(
        "s = Shape <start = 0, end = 1> (x) f = Cast <to = 1> (s) h = Mul (f, half) c = Ceil (h) i = Cast <to = 7> (c) "
        "out = Slice (x, none, i, none)",
        inputs="float[time, 2] x",
        outputs="float[shorter, 2] out",
        weights={"half": np.array([0.5], np.float32), "none": np.array([0])},
    )
    graph = capture(model)
    for time in (16, 7, 1):
        assert_same(model, graph, torch.randn(time, 2))


def test_types_hold_for_images() -> None:
    model = parsed(
        "y = Conv <strides = [2, 2], pads = [1, 0, 0, 1]> (x, w, b) z = MaxPool <kernel_shape = [2, 2]> (y) "
        "out = GlobalAveragePool (z)",
        inputs="float[n, 3, h, w_] x",
        outputs="float[n, 4, 1, 1] out",
        weights={"w": GENERATOR.standard_normal((4, 3, 3, 3)).astype(np.float32), "b": np.zeros(4, np.float32)},
    )
    graph = capture(model)
    (conv,) = graph.module.graph.find_nodes(op="call_function", target=op("Conv"))
    assert str(tensor_spec(conv)) == "float32[2?, 4, 112?, 112?]"
    assert str(tensor_spec(outputs(graph)[0])) == "float32[2?, 4, 1, 1]"
    assert_same(model, graph, torch.randn(1, 3, 65, 50))


def test_tensors_keep_their_names() -> None:
    weights = {
        "a": np.array([1, 2], np.float32),
        "a.b": np.array([3, 4], np.float32),
        "onnx::Add_7": np.array([5, 6], np.float32),
        "forward": np.array([7, 8], np.float32),
    }
    body = "p = Add (x, a) q = Add (p, c) r = Add (q, d) out = Add (r, e)"
    model = parsed(
        body,
        inputs="float[n, 2] x",
        outputs="float[n, 2] out",
        weights=dict(zip("acde", weights.values(), strict=True)),
    )
    for proto, name in zip(model.graph.initializer, weights, strict=True):
        for node in model.graph.node:
            node.input[:] = [name if each == proto.name else each for each in node.input]
        proto.name = name
    graph = capture(model)
    assert set(graph.tensors()) == {"a", "a_b_", "onnx::Add_7", "forward_"}
    assert all(isinstance(tensor, nn.Parameter) for tensor in graph.tensors().values())
    assert set(write(graph).weights) == set(weights)
    assert_same(model, graph, torch.randn(3, 2))


def test_what_is_no_weight_is_no_parameter() -> None:
    model = parsed(
        "p = Div (x, scale) q = Mul (p, gain) r = Mul (q, half) out = Pow (r, two)",
        inputs="float[n, 2] x",
        outputs="float[n, 2] out",
        weights={
            "scale": np.array([2, 4], np.float32),
            "gain": np.array([1, 3], np.float32),
            "half": np.float32(0.5),
            "two": np.array([2, 2], np.float32),
        },
    )
    graph = capture(model)
    assert [name for name, _ in graph.module.named_parameters()] == ["gain"]
    assert_same(model, graph, torch.randn(3, 2))


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_is_always_taken_is_followed(taken: bool) -> None:
    then = onnx.parser.parse_graph("yes () => (float[n, 2] a) { a = Neg (x) }")
    otherwise = onnx.parser.parse_graph("no () => (float[n, 2] b) { b = Exp (x) }")
    model = parsed("out = Identity (x)", inputs="float[n, 2] x", outputs="float[n, 2] out")
    model.graph.node[0].CopyFrom(
        onnx.helper.make_node("If", ["condition"], ["out"], then_branch=then, else_branch=otherwise)
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(taken), "condition"))
    graph = capture(model)
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "onnx.Neg" if taken else "onnx.Exp"
    ]
    assert_same(model, graph, torch.randn(3, 2))


def test_a_branch_that_depends_on_data_is_refused() -> None:
    then = onnx.parser.parse_graph("yes () => (float[n, 2] a) { a = Neg (x) }")
    otherwise = onnx.parser.parse_graph("no () => (float[n, 2] b) { b = Exp (x) }")
    model = parsed("out = Identity (x)", inputs="float[n, 2] x, bool[1] condition", outputs="float[n, 2] out")
    model.graph.node[0].CopyFrom(
        onnx.helper.make_node("If", ["condition"], ["out"], name="choice", then_branch=then, else_branch=otherwise)
    )
    with pytest.raises(UnsupportedOperatorError, match="'choice' is a If, whose course depends on data"):
        capture(model)


def test_results_that_are_inputs_tensors_or_twice_the_same() -> None:
    model = parsed(
        "y = Relu (x) a = Identity (y) b = Identity (y) c = Identity (x) d = Identity (w) e = Neg (y)",
        inputs="float[n, 2] x",
        outputs="float[n, 2] a, float[n, 2] b, float[n, 2] c, float[2] d, float[n, 2] e",
        weights={"w": np.array([1, 2], np.float32)},
    )
    graph = capture(model)
    assert_same(model, graph, torch.randn(3, 2))
    assert [each.name for each in rebuilt(graph).graph.output] == ["a", "b", "c", "d", "e"]


def test_a_result_is_declared_with_what_it_is() -> None:
    model = heads(ARITHMETIC["copied sizes"])
    (declared,) = rebuilt(capture(model)).graph.output
    dims = [dim.dim_param or dim.dim_value for dim in declared.type.tensor_type.shape.dim]
    assert dims == ["batch", 2, "time", 2]


def test_several_results() -> None:
    model = parsed(
        "v, i = TopK <axis = -1> (x, k) a, b = Split <axis = -1> (v, parts) s = Add (a, b) j = Cast <to = 1> (i)",
        inputs="float[n, 6] x",
        outputs="float[n, 2] s, float[n, 4] j",
        weights={"k": np.array([4]), "parts": np.array([2, 2])},
    )
    graph = capture(model)
    assert [n.target for n in graph.nodes if n.op == "call_function"].count(operator.getitem) == 4
    assert_same(model, graph, torch.randn(3, 6))


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_arguments_that_became_inputs_are_written_as_the_opset_has_them(opset: int) -> None:
    axes = "axes = [1], " if opset < 18 else ""
    given = "" if opset < 18 else ", axes"
    model = parsed(
        f"y = ReduceMean <{axes}keepdims = 1> (x{given}) out = Sub (x, y)",
        inputs="float[n, 6] x",
        outputs="float[n, 6] out",
        opset=opset,
        weights={} if opset < 18 else {"axes": np.array([1])},
    )
    graph = capture(model)
    (mean,) = graph.module.graph.find_nodes(op="call_function", target=op("ReduceMean"))
    assert mean.args[1] == [1]
    assert facts_of(graph).opset == opset
    assert_same(model, graph, torch.randn(3, 6))


def test_an_operator_that_the_opset_does_not_have_is_not_written() -> None:
    model = parsed("out = Relu (x)", inputs="float[n, 6] x", outputs="float[n, 6] out", opset=17)
    graph = capture(model)
    next(node for node in graph.nodes if node.op == "call_function").target = op("Gelu")
    with pytest.raises(LoweringError, match="is a Gelu, which opset 17 does not have"):
        write(graph)


def test_the_same_model_gives_the_same_bytes() -> None:
    model = heads(ARITHMETIC["of one entry"])
    first, second = (rebuilt(capture(model)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_graphs_of_graphsurgeon_are_read_and_made() -> None:
    model = heads(ARITHMETIC["copied sizes"])
    graph = capture(gs.import_onnx(model))
    assert_same(model, graph, torch.randn(3, 4, 6))
    again = gs.export_onnx(to_graphsurgeon(graph))
    np.testing.assert_array_equal(run(again, torch.ones(1, 2, 6))[0], run(model, torch.ones(1, 2, 6))[0])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = heads(ARITHMETIC["copied sizes"])
    before = model.SerializeToString(deterministic=True)
    onnx.save(model, tmp_path / "net.onnx")
    graph = capture(model)
    graph.set_tensor("w", nn.Parameter(torch.zeros(6, 4)))
    assert model.SerializeToString(deterministic=True) == before
    assert_same(model, capture(tmp_path / "net.onnx"), torch.randn(1, 2, 6))


class TestInputs:
    MODEL = parsed(
        "y = MatMul (x, w) z = Gather <axis = 0> (table, ids) out = Add (y, z)",
        inputs="float[batch, 6] x, int64[batch] ids",
        outputs="float[batch, 4] out",
        weights={"w": WEIGHT, "table": WEIGHT},
    )

    def test_made_up(self) -> None:
        x, ids = capture(self.MODEL).example_inputs[0]
        assert x.shape == (2, 6)
        assert ids.shape == (2,)
        assert ids.dtype is torch.int64
        assert int(ids.max()) < 6

    def test_by_name(self) -> None:
        graph = capture(self.MODEL, {"ids": torch.tensor([5]), "x": torch.ones(1, 6)})
        assert_same(self.MODEL, graph, *graph.example_inputs[0])

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ((torch.ones(1, 6),), r"takes 2 inputs, \['x', 'ids'\]; found 1"),
            ({"x": torch.ones(1, 6)}, r"inputs are \['x', 'ids'\]; example_inputs are for \['x'\]"),
            ((torch.ones(1, 6), torch.ones(1)), "input ids is declared as int64; the example is float32"),
            ((torch.ones(1, 5), torch.tensor([1])), r"input x \[batch, 6\] cannot be of shape \[1, 5\]"),
        ],
    )
    def test_that_do_not_fit(self, inputs: Any, message: str) -> None:
        with pytest.raises(CaptureError, match=message):
            capture(self.MODEL, inputs)

    def test_sizes_that_the_model_does_not_take(self) -> None:
        """The file says that any time will do; the table has ten positions."""
        model = parsed(
            "out = Add (x, positions)",
            inputs="float[batch, time, 6] x",
            outputs="float[batch, time, 6] out",
            weights={"positions": GENERATOR.standard_normal((10, 6)).astype(np.float32)},
        )
        with pytest.raises(CaptureError, match=r"The inputs are x \[batch, time, 6\]: pass example_inputs that fit"):
            capture(model)
        graph = capture(model, torch.randn(2, 10, 6))
        assert "does not run at other sizes than" in graph.notes[0]
        assert not any(tensor_spec(next(iter(graph.nodes))).dynamic)


def test_capture_is_public() -> None:
    assert graphopt.inspect(heads(ARITHMETIC["copied sizes"])).groups is not None


@pytest.mark.parametrize(
    ("name", "scopes", "owner"),
    [
        ("/layer1/layer1.0/conv1/Conv", None, "layer1.0.conv1"),
        ("/layers.0/blocks/blocks.1/attn/qkv/MatMul", None, "layers.0.blocks.1.attn.qkv"),
        ("/Reshape", None, ""),
        ("node_conv2d", "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d']", "layer1.0.conv1"),
        ("node_conv2d", "not a list", "node_conv2d"),
        ("Conv_7", None, "Conv_7"),
    ],
)
def test_owners_are_read_from_what_exporters_write(name: str, scopes: str | None, owner: str) -> None:
    model = parsed("out = Relu (x)", inputs="float[n, 2] x", outputs="float[n, 2] out")
    model.graph.node[0].name = name
    if scopes is not None:
        model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    (call,) = [node for node in capture(model).nodes if node.op == "call_function"]
    assert call.meta["owner"] == owner


def test_tensors_stand_in_the_order_of_first_use() -> None:
    model = parsed(
        "p = MatMul (x, w) q = Add (p, b) out = MatMul (q, v)",
        inputs="float[n, 6] x",
        outputs="float[n, 6] out",
        weights={"v": WEIGHT.T.copy(), "b": WEIGHT[0], "w": WEIGHT},
    )
    assert list(capture(model).tensors()) == ["w", "b", "v"]


def test_a_model_of_onnx_becomes_a_program_of_torch(tmp_path: Path) -> None:
    result = graphopt.optimize(heads(ARITHMETIC["copied sizes"]), target="torch", output=tmp_path)
    program = torch.export.load(result.artifacts["pt2"])
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(program.module()(x), result.module(x))


def test_a_tensor_among_the_attributes_is_written_as_one() -> None:
    model = parsed(
        "s = Shape (x) y = ConstantOfShape <value = float[1] {2.5}> (s) out = Add (x, y)",
        inputs="float[n, 6] x",
        outputs="float[n, 6] out",
    )
    graph = capture(model)
    assert_same(model, graph, torch.randn(3, 6))
    assert not any("value" in name for name in write(graph).weights)


@pytest.mark.parametrize(("declared", "written"), [(9, 9), (10, 10), (onnx.IR_VERSION, 10)])
def test_a_newer_format_than_is_needed_is_not_asked_for(declared: int, written: int) -> None:
    """ONNX Runtime refuses what onnx declares by default, where it is the older of the two."""
    model = parsed("out = Relu (x)", inputs="float[n, 6] x", outputs="float[n, 6] out", opset=18)
    model.ir_version = declared
    again = rebuilt(capture(model))
    assert again.ir_version == written
    run(again, torch.randn(2, 6))

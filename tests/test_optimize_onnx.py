"""Check what `graphopt.optimize` does for ONNX models, from file to file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import graphopt
from graphopt import Budget
from graphopt.capture import capture
from graphopt.cli import app
from graphopt.dialects import infer
from graphopt.errors import BudgetError, GraphOptError
from graphopt.masking import masked_graph
from graphopt.optimize import Result
from graphopt.verify import masked_outputs

RANDOM = np.random.default_rng(3)


def random(*shape: int) -> Any:
    return (RANDOM.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


WEIGHTS: dict[str, Any] = {
    "stem.weight": random(16, 3, 3, 3),
    "stem.bias": random(16),
    "block.conv1.weight": random(32, 16, 1, 1),
    "block.norm.weight": random(32) + 1,
    "block.norm.bias": random(32),
    "block.norm.mean": random(32),
    "block.norm.var": abs(random(32)) + 0.5,
    "block.conv2.weight": random(32, 1, 3, 3),
    "block.conv3.weight": random(16, 32, 1, 1),
    "head.norm.weight": random(16) + 1,
    "head.norm.bias": random(16),
    "head.hidden": random(16, 24),
    "head.hidden.bias": random(24),
    "head.out": random(24, 5),
}

NET = """
<ir_version: 9, opset_import: ["": 18], producer_name: "someone", producer_version: "3">
net (float[batch, 3, 8, 8] image) => (float[batch, 5] scores, float[batch, 16, 4, 4] map) {
    s0 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, "stem.weight", "stem.bias")
    s = Relu (s0)
    a = Conv ("s", "block.conv1.weight")
    n = BatchNormalization (a, "block.norm.weight", "block.norm.bias", "block.norm.mean", "block.norm.var")
    r = Clip (n, low, high)
    d = Conv <group = 32, pads = [1, 1, 1, 1]> (r, "block.conv2.weight")
    e = Relu (d)
    p = Conv (e, "block.conv3.weight")
    map = Add (s, p)
    g = GlobalAveragePool (map)
    f = Flatten (g)
    l = LayerNormalization (f, "head.norm.weight", "head.norm.bias")
    h0 = MatMul (l, "head.hidden")
    h1 = Add (h0, "head.hidden.bias")
    h = Gelu_ (h1)
    scores = MatMul (h, "head.out")
}
"""


def net() -> Any:
    text = NET.replace('"s"', "s").replace("Gelu_", "Tanh")
    for name in WEIGHTS:
        text = text.replace(f'"{name}"', name.replace(".", "__"))
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.input[:] = [each.replace("__", ".") for each in node.input]
    for name, value in {**WEIGHTS, "low": np.float32(0), "high": np.float32(6)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: Any, x: Any) -> list[Any]:
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, {session.get_inputs()[0].name: x})
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "net.onnx"
    onnx.save(net(), file)
    return file


@pytest.fixture(scope="module")
def result(path: Path) -> Result:
    return graphopt.optimize(path, target="onnx", budget=Budget(flops=0.5))


def test_a_file_is_pruned_and_proved(result: Result) -> None:
    assert result.report.after.flops <= 0.5 * result.report.before.flops
    assert result.report.groups
    assert not result.report.unknown
    assert all(comparison.passed for comparison in result.report.comparisons)
    assert not result.report.warnings
    for batch in (1, 4):
        scores, features = run(result.onnx, RANDOM.standard_normal((batch, 3, 8, 8)).astype(np.float32))
        assert scores.shape == (batch, 5)
        assert features.shape == (batch, 16, 4, 4)


def test_the_plan_speaks_of_the_files_tensors(result: Result) -> None:
    kept = result.plan.keep
    assert kept
    assert set(kept) <= set(WEIGHTS)
    hidden = kept["block.conv1.weight"][0]
    np.testing.assert_array_equal(hidden, kept["block.conv2.weight"][0])
    np.testing.assert_array_equal(hidden, kept["block.conv3.weight"][1])
    np.testing.assert_array_equal(hidden, kept["block.norm.var"][0])
    assert "stem.weight" not in kept  # its channels are among the model's results


def test_inputs_outputs_and_facts_stay(result: Result) -> None:
    model = result.onnx
    onnx.checker.check_model(model, full_check=True)
    assert [each.name for each in model.graph.input] == ["image"]
    assert [each.name for each in model.graph.output] == ["scores", "map"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert (model.producer_name, model.producer_version, model.opset_import[0].version) == ("someone", "3", 18)


def test_pruned_is_masked_in_onnx_runtime(path: Path) -> None:
    """Write the masked original by hand, and compare the two files alone; no norm may see fewer channels here."""
    budget = Budget(flops=0.6)
    result = graphopt.optimize(
        path, target="onnx", budget=budget, pipeline="prune-channels{constraints.normalised=never}"
    )
    masked = net()
    for proto in masked.graph.initializer:
        value = onnx.numpy_helper.to_array(proto).copy()
        for dim, kept in result.plan.keep.get(proto.name, {}).items():
            removed = np.setdiff1d(np.arange(value.shape[dim]), kept)
            if not proto.name.endswith((".mean", ".var")):
                value[(slice(None),) * dim + (removed,)] = 0
        proto.CopyFrom(onnx.numpy_helper.from_array(value, proto.name))
    x = RANDOM.standard_normal((3, 3, 8, 8)).astype(np.float32)
    for a, b in zip(run(masked, x), run(result.onnx, x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_the_masked_reference_is_a_graph(path: Path) -> None:
    """It computes in ONNX Runtime what the interpreter computes that puts zeros in, where something normalises, too."""
    model = onnx.load(path)
    (last,) = [node for node in model.graph.node if node.op_type == "GlobalAveragePool"]
    last.input[0] = "p"  # so that the channels are no result, and the norm may lose some
    model.graph.output.pop()
    graph = capture(model)
    typing = infer(graph)
    keep = {group.atom: np.sort(RANDOM.permutation(group.size)[: group.size - 3]) for group in typing.groups}
    assert any(group.normalised for group in typing.groups)
    reference = masked_graph(typing, keep)
    assert reference is not None
    x = torch.randn(2, 3, 8, 8)
    (expected,) = tree_leaves(masked_outputs(typing, keep, (x,), {}, double=True))
    torch.testing.assert_close(reference.run(x).double(), expected, rtol=1e-5, atol=1e-6)
    (found,) = run(graphopt.optimize(reference, target="onnx", pipeline="", verify="off").onnx, x.numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_same_file_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        graphopt.optimize(path, target="onnx", budget=Budget(flops=0.5), output=tmp_path / name)
        found.append((tmp_path / name / "model.onnx").read_bytes())
    assert found[0] == found[1]


def test_the_model_is_left_as_it_was(path: Path) -> None:
    model = net()
    before = model.SerializeToString(deterministic=True)
    graphopt.optimize(model, target="onnx", budget=Budget(flops=0.5))
    assert model.SerializeToString(deterministic=True) == before


def test_torch_and_onnx_see_the_same_model(path: Path) -> None:
    """What comes of a file trains: a step of training reaches the file that is written."""
    result = graphopt.optimize(path, target="torch", budget=Budget(flops=0.5))
    module = result.module.train()
    x = torch.randn(4, 3, 8, 8)
    scores, _ = module(x)
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2, 3])).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    with torch.no_grad():
        module.get_parameter("head.out").mul_(2)
    again = graphopt.optimize(result, target="onnx", pipeline="")
    before, after = run(result.onnx, x.numpy())[0], run(again.onnx, x.numpy())[0]
    np.testing.assert_allclose(after, 2 * before, rtol=1e-4, atol=1e-5)


def test_a_budget_that_cannot_be_met(path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        graphopt.optimize(path, target="onnx", budget=Budget(flops=0.0001))
    assert caught.value.smallest


def test_inspection_speaks_of_the_files_tensors(path: Path) -> None:
    found = graphopt.inspect(path)
    assert "block.conv1.weight" in str(found.coupling.explain("block.conv2.weight", 0))
    assert {row.name for row in found.layers} >= {"stem", "block.conv1", "block.norm", "head"}


def test_command_line(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = CliRunner().invoke(app, ["optimize", str(path), "--target", "onnx", "--flops", "0.5", "-o", str(out)])
    assert ended.exit_code == 0, ended.output
    assert {each.name for each in out.iterdir()} >= {"model.onnx", "manifest.json", "report.html"}
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert "onnx" in manifest["artifacts"]


def test_a_failure_leaves_a_reproducer_of_the_same_kind(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError), graphopt.debugging(reproducer=tmp_path / "failure"):
        graphopt.optimize(path, target="onnx", budget=Budget(flops=0.0001))
    assert (tmp_path / "failure" / "model.onnx").exists()
    from graphopt.debugging import Reproducer

    with pytest.raises(GraphOptError):
        graphopt.optimize(**Reproducer.load(tmp_path / "failure"))


def test_a_group_is_named_with_its_layer_where_its_tensor_does_not_say_it(tmp_path: Path) -> None:
    """TorchScript's exporter gives transposed and folded weights numbers for names."""
    model = net()
    for proto in model.graph.initializer:
        if proto.name == "head.hidden":
            proto.name = "onnx::MatMul_7"
    for node in model.graph.node:
        node.input[:] = ["onnx::MatMul_7" if each == "head.hidden" else each for each in node.input]
        if "onnx::MatMul_7" in node.input:
            node.name = "/head/hidden/MatMul"
    (row,) = [row for row in graphopt.inspect(model).groups if "onnx::MatMul_7[1]" in row.places]
    assert (row.name, row.layer) == ("onnx::MatMul_7[1]", "head.hidden")
    result = graphopt.optimize(model, target="torch", budget=Budget(params=0.5), output=tmp_path)
    assert "onnx::MatMul_7[1] head.hidden" in " ".join(str(result.report).split())
    assert "head.hidden</span>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {row.layer for row in graphopt.inspect(net()).groups} == {""}

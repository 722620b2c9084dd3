"""Test that ONNX files say how they were made, come out the same, and arrive whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.capture.onnx.weights import buffer
from graphopt.errors import GraphOptError, LoweringError
from graphopt.targets import onnx as target_module
from graphopt.targets.lowering import storage
from graphopt.targets.onnx import OnnxTarget


def _model() -> onnx.ModelProto:
    """Return two linear layers with an Identity to remove, and properties of the user's own."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("z.weight", (64, 32)), ("a.weight", (32, 64)), ("m.bias", (64,)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], name="one"),
        helper.make_node("Add", ["h", "m.bias"], ["b"], name="bias"),
        helper.make_node("Identity", ["b"], ["i"], name="nothing"),
        helper.make_node("Relu", ["i"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "z.weight"], ["y"], name="two"),
    ]
    values = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
    )
    model = helper.make_model(
        helper.make_graph(nodes, "graph", *values, weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    for key, value in (("task", "regression"), ("author", "someone")):
        model.metadata_props.add(key=key, value=value)
    return model


def _properties(path: Path) -> list[tuple[str, str]]:
    return [(entry.key, entry.value) for entry in onnx.load(path, load_external_data=False).metadata_props]


def test_a_file_says_how_it_was_made_besides_what_it_said(tmp_path: Path) -> None:
    result = graphopt.optimize(_model(), target="onnx", output=tmp_path)
    found = _properties(tmp_path / "model.onnx")
    assert [key for key, _ in found] == [
        "author",
        "graphopt.pipeline",
        "graphopt.seed",
        "graphopt.target",
        "graphopt.version",
        "task",
    ]
    said = dict(found)
    assert said["task"] == "regression"
    assert said["graphopt.pipeline"] == result.report.pipeline != ""
    assert said["graphopt.version"] == result.report.versions["graphopt"]
    assert {entry.key: entry.value for entry in result.onnx.metadata_props} == said
    again = graphopt.optimize(tmp_path / "model.onnx", target="onnx", output=tmp_path / "again")
    assert dict(_properties(tmp_path / "again" / "model.onnx")) == said | {"graphopt.pipeline": again.report.pipeline}


def test_a_file_of_a_module_says_so_too(tmp_path: Path) -> None:
    graphopt.optimize(nn.Linear(8, 8).eval(), torch.randn(2, 8), target="onnx", output=tmp_path)
    assert {"graphopt.pipeline", "graphopt.target", "graphopt.version"} <= dict(
        _properties(tmp_path / "model.onnx")
    ).keys()


@pytest.mark.parametrize("limit", [0, storage.EMBEDDED_LIMIT])
def test_the_same_model_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(target_module, "EMBEDDED_LIMIT", limit)
    for name in ("one", "two"):
        graphopt.optimize(_model(), target="onnx", output=tmp_path / name, budget=graphopt.Budget(flops=0.6), seed=3)
    files = sorted(path.name for path in (tmp_path / "one").glob("model.onnx*"))
    assert files == (["model.onnx"] if limit else ["model.onnx", "model.onnx.data"])
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_weights_beside_the_model_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "EMBEDDED_LIMIT", 0)
    graph = capture(_model())
    lowered = OnnxTarget().lower(graph, tmp_path)
    assert lowered.onnx.graph.initializer[0].external_data[0].value == "model.onnx.data"
    x = torch.randn(3, 32)
    assert torch.equal(capture(tmp_path / "model.onnx").run(x), graph.run(x))


def _full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


def _refused(*args: Any, **options: Any) -> Any:
    raise LoweringError("the ONNX model is not well formed")


def _full_after(count: int) -> Callable[[torch.Tensor], Any]:
    calls: list[int] = []
    write = buffer

    def partly(tensor: torch.Tensor) -> Any:
        calls.append(1)
        return write(tensor) if len(calls) < count else _full_disk()

    return partly


def _full_at_last(path: Path, target: Path) -> Path:
    """Move all files but the model."""
    if path.name == "model.onnx":
        _full_disk()
    os.replace(path, target)  # noqa: PTH105 - which takes its place here
    return target


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("place", "name", "failure"),
    [
        (storage, "buffer", _full_after(2)),
        (storage, "refer", _full_disk),
        (storage, "serialized", _refused),
        (target_module, "_check_file", _refused),
        (target_module, "runner", _refused),
        (Path, "replace", _full_disk),
        (Path, "replace", _full_at_last),
    ],
    ids=["weights", "model", "serialized", "checked", "run", "moved", "half moved"],
)
def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, failure: Any, exists: bool
) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "model.onnx").write_text("the one before")
        (folder / "model.onnx.data").write_text("its weights")
        (folder / "mine.txt").write_text("mine")
    graph = capture(_model())
    monkeypatch.setattr(target_module, "EMBEDDED_LIMIT", 0)
    monkeypatch.setattr(place, name, failure)
    with pytest.raises(GraphOptError):
        OnnxTarget().lower(graph, folder)
    assert folder.exists() == exists
    if exists:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "model.onnx": "the one before",
            "model.onnx.data": "its weights",
            "mine.txt": "mine",
        }


def test_a_model_too_large_for_one_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        def SerializeToString(self, deterministic: bool) -> bytes:  # noqa: N802 - as protobuf calls it
            raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    large: Any = Large()
    with pytest.raises(LoweringError, match=r"exceeds maximum.*Nothing was written: split the model"):
        storage.serialized(large)


_LARGE = """
import sys, threading, time
from pathlib import Path
import torch
from graphopt.capture import capture
from graphopt.targets.onnx import OnnxTarget
folder = Path(sys.argv[1])
def anonymous():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10
most = 0
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.01)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
graph = capture(folder / "large.onnx")
read = anonymous()
OnnxTarget(check=False).lower(graph, folder / "out")
written = anonymous()
again = capture(folder / "out" / "model.onnx")
for (name, one), (other, two) in zip(graph.module.named_parameters(), again.module.named_parameters(), strict=True):
    assert name == other
    assert torch.equal(one, two), name
print(read - before, written - before, anonymous() - before, most - before)
"""


@pytest.mark.slow
def test_two_gigabytes_are_read_and_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    side, count = 12_000, 4  # 4 layers of 576 MB
    nodes = []
    graph = onnx.GraphProto(name="large")
    for i in range(count):
        nodes.append(helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"layer{i}"))
        tensor = graph.initializer.add(name=f"w{i}", dims=[side, side], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "large.data", "offset": str(4 * side * side * i), "length": str(4 * side * side)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", side]))
    graph.output.append(helper.make_tensor_value_info(f"h{count}", TensorProto.FLOAT, ["n", side]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "large.data").open("wb") as file:  # mostly a hole, which takes no disk
        for i in range(count):
            file.seek(4 * side * side * i + 4096 * (i + 1))
            file.write(np.arange(1, 2000, dtype=np.float32).tobytes())
        file.truncate(4 * side * side * count)
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(graphopt.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    read, written, compared, most = map(int, done.stdout.split()[-4:])
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 2_200_000_000
    assert max(read, written, compared, most) < 1 << 28, (read, written, compared, most)


def test_an_output_without_a_shape_is_written_with_one(tmp_path: Path) -> None:
    given = _model()
    given.graph.output[0].type.tensor_type.ClearField("shape")
    graphopt.optimize(given, target="onnx", output=tmp_path)
    (output,) = onnx.load(tmp_path / "model.onnx").graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [0, 32]

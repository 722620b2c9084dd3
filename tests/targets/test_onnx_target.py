"""Lower small models of each kind to ONNX, and run the files in ONNX Runtime at several batch sizes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.errors import LoweringError, MissingDependencyError, VerificationError
from graphopt.graph import Graph
from graphopt.targets import onnx as target_module
from graphopt.targets.lowering import storage
from graphopt.targets.lowering.translate import translate
from graphopt.targets.onnx import OnnxTarget

from .models import Attention, Conv, Nested, Sizes, Tied, Writes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a file and return its outputs by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, arrays, strict=True)}


def lower(model: nn.Module, inputs: Any, folder: Path, **options: Any) -> tuple[Graph, Path]:
    graph = capture(model.eval(), inputs, **options)
    lowered = OnnxTarget().lower(graph, folder)
    assert lowered.artifacts == {"onnx": folder / "model.onnx"}
    assert lowered.notes == (), "it went another way than the one under test"
    assert lowered.checks
    assert all(check.passed for check in lowered.checks)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(lowered.onnx, full_check=True)
    return graph, folder / "model.onnx"


@pytest.mark.parametrize("batch", [1, 5])
def test_convolutional(batch: int, tmp_path: Path) -> None:
    model = Conv()
    _, path = lower(model, torch.randn(2, 3, 8, 8), tmp_path)
    image = torch.randn(batch, 3, 8, 8)
    torch.testing.assert_close(run(path, {"image": image})["output"], model(image).detach())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_with_keyword_inputs_and_dict_outputs(batch: int, groups: int, masked: bool, tmp_path: Path) -> None:
    model = Attention(groups=groups)

    def inputs(rows: int) -> dict[str, torch.Tensor]:
        found = {"tokens": torch.randn(rows, 6, 16)}
        return found | ({"mask": torch.rand(rows, 6) > 0.5} if masked else {})

    _, path = lower(model, inputs(2), tmp_path)
    feeds = inputs(batch)
    if masked:
        feeds["mask"][0] = False
    found = run(path, feeds)
    for name, expected in model(**feeds).items():
        torch.testing.assert_close(found[name], expected.detach())


def test_one_row_as_example_leaves_the_batch_dynamic(tmp_path: Path) -> None:
    model = Conv()
    _, path = lower(model, torch.randn(1, 3, 8, 8), tmp_path)
    image = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(run(path, {"image": image})["output"], model(image).detach())


def test_two_dynamic_dimensions(tmp_path: Path) -> None:
    model = Attention(groups=2)
    _, path = lower(model, {"tokens": torch.randn(2, 6, 16)}, tmp_path, dynamic={"tokens": {1: "length"}})
    tokens = torch.randn(3, 9, 16)
    torch.testing.assert_close(run(path, {"tokens": tokens})["hidden"], model(tokens)["hidden"].detach())
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", "tokens_1", 16]


def test_nested_inputs_and_outputs_have_readable_names(tmp_path: Path) -> None:
    model = Nested()
    pair = (torch.randn(2, 4), {"shift": torch.randn(2, 4)})
    _, path = lower(model, (pair, 2.0), tmp_path)
    feeds = {"pair.0": torch.randn(3, 4), "pair.1.shift": torch.randn(3, 4)}
    found = run(path, feeds)
    expected = model((feeds["pair.0"], {"shift": feeds["pair.1.shift"]}), 2.0)
    assert list(found) == ["logits", "states.0", "states.1"]
    torch.testing.assert_close(found["logits"], expected.logits.detach())
    torch.testing.assert_close(found["states.1"], feeds["pair.0"])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_sizes_that_depend_on_the_batch(rows: int, tmp_path: Path) -> None:
    model = Sizes()
    _, path = lower(model, torch.randn(3, 4), tmp_path)
    x = torch.randn(rows, 4)
    found = list(run(path, {"x": x}).values())
    for actual, expected in zip(found, model(x), strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=True)


@pytest.mark.parametrize("rows", [1, 4])
def test_writes_into_views(rows: int, tmp_path: Path) -> None:
    model = Writes()
    _, path = lower(model, torch.randn(2, 4, 4), tmp_path)
    x = torch.randn(rows, 4, 4)
    for actual, expected in zip(run(path, {"x": x}).values(), model(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_weights_keep_their_names_and_tied_ones_are_stored_once(tmp_path: Path) -> None:
    _, path = lower(Tied(), torch.randint(300, (2, 5)), tmp_path)
    model = onnx.load(path)
    assert len(model.graph.initializer) == 1
    assert model.graph.initializer[0].name in ("embed.weight", "head.weight")
    assert path.stat().st_size < 300 * 64 * 4 + 4096
    lower(Conv(), torch.randn(2, 3, 8, 8), tmp_path)
    names = {t.name for t in onnx.load(path).graph.initializer}
    assert {"stem.weight", "stem.bias", "norm.running_mean", "body.weight", "head.weight"} <= names


def test_file_says_who_wrote_it_and_in_what_opset(tmp_path: Path) -> None:
    _, path = lower(Tied(), torch.randint(300, (2, 5)), tmp_path)
    model = onnx.load(path)
    assert model.producer_name == "graphopt"
    assert {p.key: p.value for p in model.metadata_props} == {"graphopt.version": model.producer_version}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]


def test_large_weights_stand_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "EMBEDDED_LIMIT", 1000)
    lowered = OnnxTarget().lower(capture(Tied().eval(), torch.randint(300, (2, 5))), tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["model.onnx", "model.onnx.data"]
    proto = onnx.load(tmp_path / "elsewhere" / "model.onnx", load_external_data=False)
    places = {entry.key: entry.value for entry in proto.graph.initializer[0].external_data}
    assert places["location"] == "model.onnx.data"
    assert int(places["offset"]) % storage.ALIGNMENT == 0
    ids = torch.randint(300, (4, 5))
    found = run(tmp_path / "elsewhere" / "model.onnx", {"ids": ids})["output"]
    assert found.shape == (4, 5, 300)
    assert not lowered.onnx.graph.initializer[0].raw_data  # not a second time in memory
    assert lowered.onnx == proto
    assert lowered.notes == ("the weights stand in model.onnx.data: the model in memory refers to that file",)


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lowered = OnnxTarget().lower(capture(Conv().eval(), torch.randn(2, 3, 8, 8)))
    assert lowered.artifacts == {}
    assert [check.inputs for check in lowered.checks] == ["example", "twice the batch", "batch of one"]
    assert list(tmp_path.iterdir()) == []


def test_graph_is_not_changed(tmp_path: Path) -> None:
    graph = capture(Writes().eval(), torch.randn(2, 4, 4))
    before, buffers = graph.text(), dict(graph.module.named_buffers())
    OnnxTarget().lower(graph, tmp_path)
    assert graph.text() == before
    assert dict(graph.module.named_buffers()).keys() == buffers.keys()


def test_operator_without_a_translation_goes_through_the_exporter(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 3, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"tokens": self.gru(tokens)[0]}

    model = Recurrent()
    lowered = OnnxTarget().lower(capture(model.eval(), torch.randn(2, 5, 4)), tmp_path)
    assert any("aten.gru.input (node gru)" in note and "torch.onnx" in note for note in lowered.notes)
    tokens = torch.randn(3, 5, 4)
    found = run(tmp_path / "model.onnx", {"tokens": tokens})
    torch.testing.assert_close(found["tokens_2"], model(tokens)["tokens"].detach(), rtol=1e-4, atol=1e-5)


def test_operator_that_nothing_exports_is_refused_by_name(tmp_path: Path) -> None:
    class Eigen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    graph = capture(Eigen().eval(), torch.randn(2, 3, 3))
    with pytest.raises(
        LoweringError, match=r"aten.linalg_eigvals.default \(node linalg_eigvals\).*use the target 'torch'"
    ):
        OnnxTarget().lower(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(Conv().eval(), torch.randn(2, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"writing an ONNX file needs .*pip install 'graphopt\[onnx\]'"):
        OnnxTarget().lower(graph)


def test_wrong_file_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = translate

    def spoiled(graph: Graph) -> Any:
        translated = original(graph)
        translated.weights["head.weight"] = translated.weights["head.weight"] * 1.01
        return translated

    monkeypatch.setattr(target_module, "translate", spoiled)
    graph = capture(Conv().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(VerificationError, match="onnxruntime does not compute what the graph computes"):
        OnnxTarget().lower(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert OnnxTarget(check=False).lower(graph, tmp_path / "out").checks == ()


def test_outputs_are_matched_by_structure() -> None:
    graph = capture(Nested().eval(), ((torch.randn(2, 4), {"shift": torch.randn(2, 4)}),))
    assert len(pytree.tree_leaves(graph.run((torch.randn(2, 4), {"shift": torch.randn(2, 4)})))) == 3

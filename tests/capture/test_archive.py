"""Check that programs are read from files, and that no file can run code."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.capture.archive import load
from graphopt.errors import CaptureError
from tests.capture.compare import assert_evaluates_like
from tests.capture.models import Net, Tied, warm


def save(model: nn.Module, path: Path, *args: Any) -> Path:
    """Export ``model`` with a varying batch and save it."""
    torch.export.save(torch.export.export(model.eval(), args, dynamic_shapes=({0: Dim.AUTO},)), path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path / "model.pt2", torch.ones(2, 3))


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """Rewrite the entries of an archive; None drops one."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
        for name, data in more.items():
            new.writestr(f"model/{name}", data)
    return target


def program_changed(path: Path, old: str, new: str) -> Path:
    """Replace text in the program of an archive."""

    def change(name: str, data: bytes) -> bytes:
        if name == "models/model.json":
            assert old.encode() in data
            return data.replace(old.encode(), new.encode())
        return data

    return rewritten(path, change)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_saved_program_is_read(tmp_path: Path, as_text: bool) -> None:
    model = warm(Net())
    path = save(model, tmp_path / "net.pt2", torch.randn(2, 3, 8, 8))
    graph = capture(str(path) if as_text else path)
    assert graph.text() == capture(model, torch.randn(2, 3, 8, 8)).text()
    assert_evaluates_like(model, graph, torch.randn(5, 3, 8, 8))


def test_a_captured_model_is_saved_and_read(tmp_path: Path) -> None:
    model = warm(Net())
    graph = capture(model, torch.randn(1, 3, 8, 8))
    path = save(graph.module, tmp_path / "net.pt2", torch.randn(2, 3, 8, 8))
    assert_evaluates_like(model, capture(path), torch.randn(5, 3, 8, 8))


def test_tied_parameters_are_tied_again(tmp_path: Path) -> None:
    model = Tied()
    graph = capture(save(model, tmp_path / "tied.pt2", torch.zeros(2, 5, dtype=torch.long)))
    assert set(graph.module.state_dict()) == set(model.state_dict())
    assert graph.module.get_parameter("head.weight") is graph.module.get_parameter("embedding.weight")
    assert_evaluates_like(model, graph, torch.randint(11, (3, 5)))


def test_sizes_that_are_arithmetic_are_read(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            y = x.reshape(-1, 2)[: (n * 3) // 2 + 1]
            return torch.cat([y, y[::2], x.new_ones(max(n, 2), 2)])

    path = save(Sizes(), tmp_path / "sizes.pt2", torch.randn(6, 4))
    assert_evaluates_like(Sizes(), capture(path), torch.randn(9, 4))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('{0}').touch()",
        "Symbol.__class__.__base__.__subclasses__()",
        "exec('1')",
        "[1 for _ in (1,)][0]",
        "(lambda: 1)()",
        "Symbol('s0; 1')",
        "print",
        "s0 +",
    ],
)
def test_sizes_that_are_more_than_arithmetic_are_refused(saved: Path, tmp_path: Path, expression: str) -> None:
    mark = tmp_path / "mark"
    with zipfile.ZipFile(saved) as archive:
        text = next(archive.read(name) for name in archive.namelist() if name.endswith("models/model.json")).decode()
    symbol = json.loads(text)["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"]
    changed = program_changed(saved, json.dumps(symbol), json.dumps(expression.format(mark)))
    with pytest.raises(CaptureError, match=r"changed.pt2, models/model.json: the size .* is no arithmetic"):
        load(changed)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.os.system", "torch.os.system is no operator, and is not called"),
        ("torch.hub.load", "torch.hub.load is no operator"),
        ("torch.ops.load_library", "torch.ops.load_library is no operator"),
        ("torch.ops.__class__.__init__", "there is no operator torch.ops.__class__"),
        ("_operator.methodcaller", "_operator.methodcaller is no operator"),
        ("math.os", "math.os is no operator"),
        ("#custom", "#custom is no operator"),
        ("eval", "eval is no operator"),
        ("torch.ops.mine.special.default", "there is no operator torch.ops.mine.special.default; import the package"),
    ],
)
def test_targets_that_are_no_operators_are_refused(saved: Path, name: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        load(program_changed(saved, "torch.ops.aten.relu.default", name))


@pytest.mark.parametrize(
    "context",
    [{"__enum__": True, "fqn": "os:sys", "name": "x"}, {"default_factory_module": "os", "default_factory_name": "x"}],
)
def test_types_that_are_looked_up_by_name_are_refused(saved: Path, context: Any) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        program = json.loads(data)
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        nesting = json.loads(signature["in_spec"])
        nesting[1]["context"] = json.dumps(context)
        signature["in_spec"] = json.dumps(nesting)
        return json.dumps(program).encode()

    with pytest.raises(CaptureError, match="nested in a type that is looked up by name"):
        load(rewritten(saved, change))


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = io.BytesIO()
    torch.save(Evil(mark), evil)

    def change(name: str, data: bytes) -> bytes:
        if name == "data/weights/model_weights_config.json":
            return data.replace(b'"use_pickle": false', b'"use_pickle": true')
        return evil.getvalue() if name.startswith("data/weights/weight_") else data

    with pytest.raises(CaptureError, match=r"0.weight is pickled, and pickles are not loaded"):
        load(rewritten(saved, change))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0"])
def test_pickled_objects_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    payload = {"path_name": name, "is_param": False, "use_pickle": False, "tensor_meta": None}

    def change(entry: str, data: bytes) -> bytes:
        if entry == "data/constants/model_constants_config.json":
            return json.dumps({"config": {"thing": payload}}).encode()
        return data

    changed = rewritten(saved, change, **{f"data/constants/{name}": pickle.dumps(Evil(mark))})
    with pytest.raises(CaptureError, match="thing is pickled, and pickles are not loaded"):
        load(changed)
    assert not mark.exists()


def test_pickled_inputs_are_refused(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = io.BytesIO()
    torch.save(((Evil(mark),), {}), evil)
    with pytest.raises(CaptureError, match="the example inputs need pickle to be read"):
        load(rewritten(saved, lambda name, data: evil.getvalue() if "sample_inputs" in name else data))
    assert not mark.exists()


def test_legacy_pickles_are_refused(saved: Path) -> None:
    changed = rewritten(saved, lambda _, data: data, **{"data/weights/model.pt": b""})
    with pytest.raises(CaptureError, match=r"holds a pickle \(data/weights/model.pt\)"):
        load(changed)


def test_compiled_code_is_refused(saved: Path) -> None:
    changed = rewritten(saved, lambda _, data: data, **{"data/aotinductor/model/x.so": b""})
    with pytest.raises(CaptureError, match=r"holds compiled code .* which is not loaded"):
        load(changed)


def test_a_second_program_is_examined_too(saved: Path) -> None:
    changed = rewritten(saved, lambda _, data: data, **{"models/other.json": b'{"target": "torch.os.system"}'})
    with pytest.raises(CaptureError, match=r"models/other.json: torch.os.system is no operator"):
        load(changed)


def test_names_that_hide_one_another_are_refused(saved: Path) -> None:
    changed = rewritten(saved, lambda _, data: data)
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("other/models/model.json", "{}")
    with pytest.raises(CaptureError, match="holds no exported program, or one of an old layout"):
        load(changed)


def test_other_and_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(CaptureError, match=r"text.pt2 is no .pt2 archive: save the model with torch.export.save"):
        load(text)
    weights = tmp_path / "weights.pt2"
    torch.save({"w": torch.ones(2)}, weights)
    with pytest.raises(CaptureError, match="holds no exported program"):
        load(weights)
    damaged = rewritten(saved, lambda name, data: data[:10] if name == "models/model.json" else data)
    with pytest.raises(
        CaptureError, match=r"changed.pt2 cannot be read as a program saved by torch.export.save: JSONDecodeError"
    ):
        load(damaged)

"""Test how targets are found, how artifacts are written, and what a check says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphopt.errors import LoweringError, MissingDependencyError, PipelineError
from graphopt.targets import TARGETS, Check, find_target, write_manifest
from graphopt.targets.base import require, staged
from graphopt.targets.onnx import OnnxTarget
from graphopt.targets.torch import TorchTarget
from graphopt.verify import Difference


def test_targets_are_found_by_name() -> None:
    assert {"torch": TorchTarget, "onnx": OnnxTarget}.items() <= TARGETS.items()
    assert find_target("onnx") == OnnxTarget()
    own = OnnxTarget(channel_multiple=4)
    assert find_target(own) is own


def test_unknown_target_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PipelineError, match=r"unknown target 'onxx'; did you mean 'onnx'\? Valid names: .*onnx.*torch"):
        find_target("onxx")


def test_importing_the_targets_loads_no_onnx() -> None:
    code = "import sys, graphopt.targets; print(*{'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"writing a file needs the package 'nowhere_to_be_found'.*\[onnx\]"
    ):
        require("nowhere_to_be_found.part", extra="onnx", purpose="writing a file")


def test_error_inside_an_installed_package_is_not_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError):
        require("broken_package", extra="onnx", purpose="writing a file")


def test_staged_files_arrive_together(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deeper"
    with staged(folder) as stage:
        (stage / "model.onnx").write_text("model")
        (stage / "model.onnx.data").write_text("weights")
        assert list(folder.glob("model*")) == []
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


def write_half(folder: Path) -> None:
    with staged(folder) as stage:
        (stage / "model.onnx").write_text("new")
        raise RuntimeError("half way")


def test_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "old")]
    with pytest.raises(RuntimeError, match="half way"):
        write_half(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_folder_that_cannot_be_made_is_a_lowering_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LoweringError, match=r"cannot write to .*file.*choose another"),
        staged(tmp_path / "file" / "out"),
    ):
        pass


def test_manifest_lists_size_and_hash_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    path = write_manifest(tmp_path, {"onnx": tmp_path / "model.onnx"})
    entry = json.loads(path.read_text())["artifacts"]["onnx"]
    assert entry["file"] == "model.onnx"
    assert entry["sha256"] == hashlib.sha256(b"model").hexdigest()
    assert [(part["file"], part["bytes"]) for part in entry["parts"]] == [("model.onnx.data", 7)]


@pytest.mark.parametrize(
    ("relative", "noise", "passed"),
    [(1e-5, 0.0, True), (2e-3, 0.0, False), (2e-3, 1e-3, True), (5e-3, 1e-3, False), (0.3, 0.2, False)],
)
def test_check_allows_what_the_model_amplifies(relative: float, noise: float, passed: bool) -> None:
    check = Check("onnxruntime", "example", Difference(relative, 0, torch.float32), noise)
    assert check.passed is passed
    assert check.to_dict()["passed"] is passed

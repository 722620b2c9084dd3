"""Test that ONNX files are read, or refused in words."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from graphopt.capture.onnx.files import load

from .files import model


def test_a_file_is_read_with_its_weights(tmp_path: Path) -> None:
    given = model()
    onnx.save(given, tmp_path / "model.onnx")
    found = load(tmp_path / "model.onnx")
    assert found.path == tmp_path / "model.onnx"
    assert found.notes == ()
    (initializer,) = found.model.graph.initializer
    assert torch.equal(
        found.tensor(initializer), torch.from_numpy(numpy_helper.to_array(given.graph.initializer[0]).copy())
    )


def test_the_given_model_is_not_changed() -> None:
    given = model()
    given.graph.node[0].name = ""
    before = given.SerializeToString(deterministic=True)
    found = load(given)
    assert found.path is None
    assert [node.name for node in found.model.graph.node] == ["MatMul_0", "relu"]
    assert given.SerializeToString(deterministic=True) == before

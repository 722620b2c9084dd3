"""Save graphs as exported programs, read them back, and run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.capture import capture
from graphopt.targets.torch import TorchTarget

from .models import Attention, Conv


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("example", [1, 2])
def test_file_computes_what_the_model_does_for_any_batch(rows: int, example: int, tmp_path: Path) -> None:
    model = Conv().eval()
    lowered = TorchTarget().lower(capture(model, torch.randn(example, 3, 8, 8)), tmp_path)
    assert [check.inputs for check in lowered.checks][:2] == ["example", "twice the batch"]
    program = torch.export.load(lowered.artifacts["pt2"])
    image = torch.randn(rows, 3, 8, 8)
    torch.testing.assert_close(program.module()(image), model(image))
    assert set(program.state_dict) == set(model.state_dict())


def test_keywords_and_nested_results_stay(tmp_path: Path) -> None:
    model = Attention(groups=2).eval()
    inputs = {"tokens": torch.randn(2, 6, 16), "mask": torch.rand(2, 6) > 0.3}
    lowered = TorchTarget().lower(capture(model, inputs), tmp_path)
    found = torch.export.load(lowered.artifacts["pt2"]).module()(**inputs)
    torch.testing.assert_close(found, model(**inputs))


def test_nothing_happens_without_a_directory() -> None:
    lowered = TorchTarget().lower(capture(Conv().eval(), torch.randn(2, 3, 8, 8)))
    assert lowered.artifacts == {}
    assert lowered.onnx is None


def test_captured_again_it_is_the_same_model(tmp_path: Path) -> None:
    model = Conv().eval()
    path = TorchTarget().lower(capture(model, torch.randn(2, 3, 8, 8)), tmp_path).artifacts["pt2"]
    graph = capture(path)
    image = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(graph.run(image), model(image).detach())

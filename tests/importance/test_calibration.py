"""The forms a calibration batch can have."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.graph import Graph, TraceModule
from graphopt.importance.calibration import batches, classification_loss

X, Y, LABELS = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1])


def graph_with(*args: Tensor, **kwargs: Tensor) -> Graph:
    empty = fx.Graph()
    empty.output(None)
    return Graph(TraceModule(nn.Module(), empty), (args, kwargs))


@pytest.mark.parametrize(
    ("graph", "item", "args", "kwargs", "labels"),
    [
        (graph_with(X), X, (X,), {}, None),
        (graph_with(X), (X,), (X,), {}, None),
        (graph_with(X), (X, LABELS), (X,), {}, LABELS),
        (graph_with(X), [X, LABELS], (X,), {}, LABELS),
        (graph_with(X), ((X,), LABELS), (X,), {}, LABELS),
        (graph_with(X, Y), (X, Y), (X, Y), {}, None),
        (graph_with(X, Y), ((X, Y), LABELS), (X, Y), {}, LABELS),
        (graph_with(x=X), {"x": X}, (), {"x": X}, None),
        (graph_with(x=X), ({"x": X}, LABELS), (), {"x": X}, LABELS),
    ],
)
def test_a_batch_is_read_in_every_form(graph: Graph, item: Any, args: Any, kwargs: Any, labels: Any) -> None:
    (batch,) = batches([item], graph)
    assert len(batch.args) == len(args)
    assert all(a is b for a, b in zip(batch.args, args, strict=True))
    assert batch.kwargs == kwargs
    assert batch.labels is labels


def test_the_default_loss_finds_the_logits() -> None:
    logits = torch.randn(2, 3)
    expected = nn.functional.cross_entropy(logits, LABELS)
    for outputs in (logits, (logits, torch.randn(2)), {"logits": logits}):
        assert torch.equal(classification_loss(outputs, LABELS), expected)

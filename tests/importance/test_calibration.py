"""The forms a calibration batch can have."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.capture import capture
from graphopt.errors import PipelineError
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


def test_arrays_stand_for_tensors() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)[::-1]
    array.flags.writeable = False
    for item in (array, (array,), [array, LABELS], {"x": array}):
        (batch,) = batches([item], graph_with(x=X) if isinstance(item, dict) else graph_with(X))
        (found,) = (*batch.args, *batch.kwargs.values())
        assert torch.equal(found, torch.tensor([[3.0, 4, 5], [0, 1, 2]]))
    with pytest.raises(PipelineError, match="batch 1 of the calibration data holds an array of <U1, which is no type"):
        list(batches([X, np.array(["a"])], graph_with(X)))


def onnx_graph() -> Graph:
    """Return a graph of a model file with two inputs."""
    from onnx import TensorProto, helper

    shapes = {"tokens": TensorProto.INT64, "scale": TensorProto.FLOAT}
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["tokens"], ["cast"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["cast", "scale"], ["y"]),
            ],
            "model",
            [helper.make_tensor_value_info(name, kind, ["n", 3]) for name, kind in shapes.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return capture(model)


TOKENS = torch.tensor([[1, 2, 3]])
FACTOR = torch.full((1, 3), 0.5)


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        ((TOKENS, FACTOR), None),
        ([TOKENS.numpy(), FACTOR.numpy()], None),
        ({"scale": FACTOR.numpy(), "tokens": TOKENS.numpy()}, None),
        (({"scale": FACTOR, "tokens": TOKENS}, LABELS), LABELS),
        (((TOKENS, FACTOR), LABELS), LABELS),
    ],
)
def test_inputs_of_a_file_come_in_its_order_or_by_its_names(item: Any, labels: Any) -> None:
    graph = onnx_graph()
    (batch,) = batches([item], graph)
    assert not batch.kwargs
    assert batch.labels is labels
    assert torch.equal(graph.run(*batch.args), TOKENS * 0.5)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"tokens": TOKENS}, "batch 0 of the calibration data has tokens; the model takes tokens, scale: give each by"),
        ((TOKENS,), "has 1 inputs; the model takes tokens, scale: give all of them, in this order"),
        ((TOKENS, FACTOR.numpy().astype(np.float64)), "has float64 for scale, which the file declares as float32"),
        ((FACTOR, FACTOR), "has float32 for tokens, which the file declares as int64: convert it"),
        ((TOKENS, [1.0]), "has a list for scale: give a tensor or a NumPy array"),
    ],
)
def test_what_a_file_does_not_take_is_refused(item: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        list(batches([item], onnx_graph()))

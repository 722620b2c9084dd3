"""Check that training mode switches what the original's training mode switches, and says what it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphopt.capture import capture
from graphopt.graph import MODE, Graph
from tests.capture.compare import assert_evaluates_like, assert_trains_like
from tests.capture.models import Attention, Frozen, Functional, Net, warm

aten = torch.ops.aten


def modes(graph: Graph) -> list[tuple[str, dict[Any, Any]]]:
    """Return what every mode-dependent operator switches."""
    return [(str(node.target), node.meta[MODE]) for node in graph.nodes if MODE in node.meta]


def images(batch: int) -> Tensor:
    """Return random images."""
    return torch.randn(batch, 3, 6, 6)


def test_batch_norm_and_dropout_switch() -> None:
    graph = capture(warm(Net()), images(1))
    assert modes(graph) == [
        ("aten.batch_norm.default", {5: (False, True)}),
        ("aten.batch_norm.default", {5: (False, True)}),
        ("aten.dropout.default", {2: (False, True)}),
    ]
    assert graph.module.meta["counters"] == {"norm.num_batches_tracked": 1, "body.1.num_batches_tracked": 1}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm3d(4), (5, 4, 2, 2, 2)),
        (nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 3)),
        (nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (5, 4, 3, 3)),
        (nn.InstanceNorm2d(4), (5, 4, 3, 3)),
        (nn.Dropout(0.5), (5, 4)),
        (nn.Dropout(0.5, inplace=True), (5, 4)),
        (nn.Dropout2d(0.5), (5, 4, 3, 3)),
        (nn.AlphaDropout(0.5), (5, 4)),
        (nn.FeatureAlphaDropout(0.5), (5, 4, 3)),
        (nn.RReLU(), (5, 4)),
        (nn.GRU(4, 3, num_layers=2, dropout=0.5, batch_first=True), (6, 5, 4)),
        (nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True), (5, 6, 4)),
        (nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), (5, 6, 4)),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), (5, 6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_layer_with_a_mode_trains_as_in_the_original(layer: nn.Module, shape: tuple[int, ...]) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(shape[-1]))
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            if isinstance(self.layer, nn.MultiheadAttention):
                return self.layer(x, x, x, need_weights=False)[0]
            y = self.layer(x)
            return y[0] if isinstance(y, tuple) else y

    model = Holds()
    example = torch.randn(shape)
    graph = capture(model, example)
    assert graph.notes == []
    assert_evaluates_like(model, graph, torch.randn(shape))
    assert_trains_like(model, graph, torch.randn(shape), steps=3)


def test_frozen_parameters_do_not_bring_in_the_fused_encoder() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True).requires_grad_(False)
    graph = capture(model, torch.randn(2, 3, 4))
    assert "_transformer_encoder_layer_fwd" not in graph.text()
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_stays_in_evaluation_mode_stays() -> None:
    model = warm(Frozen())
    graph = capture(model, images(2))
    assert [
        (node.meta["owner"], MODE in node.meta) for node in graph.nodes if node.target is aten.batch_norm.default
    ] == [
        ("backbone.1", False),
        ("head.1", True),
    ]
    assert list(graph.module.meta["counters"]) == ["head.1.num_batches_tracked"]
    assert_trains_like(model, graph, images(4))


def test_functions_switch_as_the_model_tells_them() -> None:
    model = Functional()
    graph = capture(model, torch.randn(2, 6))
    assert modes(graph) == [("aten.dropout.default", {2: (False, True)})]
    assert graph.notes == []
    assert_trains_like(model, graph, torch.randn(4, 6))


def test_attention_dropout_is_that_of_training() -> None:
    model = Attention(0.5)
    graph = capture(model, torch.randn(1, 3, 8))
    assert modes(graph) == [("aten.scaled_dot_product_attention.default", {"dropout_p": (0.0, 0.5)})]
    assert_trains_like(model, graph, torch.randn(4, 3, 8))


def test_several_attentions_keep_their_own_dropout() -> None:
    model = nn.Sequential(Attention(0.1), Attention(0.0), Attention(0.3))
    graph = capture(model, torch.randn(2, 3, 8))
    assert [list(mode.values()) for _, mode in modes(graph)] == [[(0.0, 0.1)], [(0.0, 0.3)]]
    assert_trains_like(model, graph, torch.randn(4, 3, 8))


def test_attention_without_dropout_is_not_traced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("traced")

    monkeypatch.setattr("graphopt.capture.modes.make_fx", refuse)
    graph = capture(Attention(0.0), torch.randn(2, 3, 8))
    assert modes(graph) == []
    (note,) = capture(Attention(0.5), torch.randn(2, 3, 8)).notes
    assert "could not be traced (AssertionError)" in note


def test_a_batch_norm_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 2)

    graph = capture(Twice(), torch.randn(2, 4))
    assert graph.module.meta["counters"] == {"norm.num_batches_tracked": 2}
    assert_trains_like(Twice(), graph, torch.randn(5, 4))


def test_weight_standardisation_by_batch_norm_stays() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    model = Standardised(3, 4, 3)
    graph = capture(model, images(1))
    assert modes(graph) == []
    assert_trains_like(model, graph, images(2))
    norm = next(node for node in graph.nodes if node.target is aten.batch_norm.default)
    assert norm.args[5] is True


class TestNotes:
    """What training does in the original alone is said."""

    def test_cumulative_averages(self) -> None:
        graph = capture(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), torch.randn(2, 3))
        assert graph.notes == ["cumulative averages of batch norms (momentum=None) do not move in training: 0"]

    def test_attention_weights(self) -> None:
        class Weights(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.attention(x, x, x)[1]

        (note, *_) = capture(Weights(), torch.randn(2, 3, 4)).notes
        assert note == "attention that returns its weights (need_weights=True) has no dropout in training: attention"

    def test_stochastic_depth(self) -> None:
        class DropPath(nn.Module):
            drop_prob = 0.2

            def forward(self, x: Tensor) -> Tensor:
                return x * x.new_empty(len(x), 1).bernoulli_(0.8) / 0.8 if self.training else x

        graph = capture(nn.Sequential(nn.Linear(3, 3), DropPath()), torch.randn(2, 3))
        assert graph.notes == ["stochastic depth is not applied in training: 1"]

    def test_branches(self) -> None:
        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.cond(x.sum() > 0, lambda x: F.dropout(x, 0.5, self.training), lambda x: x.sin(), (x,))

        graph = capture(Branches(), torch.randn(2, 3))
        assert graph.notes == ["1 operators inside branches or loops stay in evaluation mode in training"]

    def test_a_model_whose_training_mode_cannot_be_traced(self) -> None:
        class Skips(Attention):
            def forward(self, x: Tensor) -> Tensor:
                if self.training and torch.rand(()) < 0.5:
                    return x
                return super().forward(x)

        (note,) = capture(Skips(0.5), torch.randn(2, 3, 8)).notes
        assert note.startswith("in training mode the model could not be traced (")

    def test_calls_at_other_places(self) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = F.dropout(self.linear(x), 0.5, self.training)
                return F.dropout(x, 0.5, True) if self.training else x

        graph = capture(Late(), torch.randn(2, 4))
        assert graph.notes == ["in training the original calls aten.dropout.default at other places than in evaluation"]
        assert modes(graph) == [("aten.dropout.default", {2: (False, True)})]


class TestPrograms:
    """Programs are switched without their model."""

    @pytest.mark.parametrize("training", [True, False])
    def test_are_switched_by_what_they_show(self, training: bool) -> None:
        model = warm(nn.Sequential(Net())).train(training)
        batch = torch.export.Dim.AUTO
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
        graph = capture(program)
        plain = capture(model, images(3))
        assert modes(graph) == modes(plain)
        assert graph.text() == plain.text()
        assert graph.module.meta["counters"] == plain.module.meta["counters"]
        assert graph.notes == (
            ["the program was exported in training mode: 3 operators were switched to evaluation"] if training else []
        )
        assert_evaluates_like(model, graph, images(4))
        assert_trains_like(model, graph, images(4))

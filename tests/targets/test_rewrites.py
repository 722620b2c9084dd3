"""Test the rewrites that make a graph ready for ONNX, each on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.aliases import family, root, source, written
from graphopt.capture import capture
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import Graph
from graphopt.targets.lowering import names
from graphopt.targets.lowering.fold import fold_constants
from graphopt.targets.lowering.functionalise import functionalise
from graphopt.targets.lowering.translate import translate

from .models import Nested, Tied, Writes


def operators(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def graph_of(module: nn.Module, *inputs: Any) -> Graph:
    return capture(module.eval(), inputs).clone()


class Table(nn.Module):
    """Add a table that follows from parameters and sizes."""

    def __init__(self, length: int = 4) -> None:
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(self.length, dtype=torch.float32)
        table = torch.zeros(self.length, 4)
        table[:, 1:3] = places[:, None]
        return x + table + (self.weight * 2).sum(0)


def test_fold_computes_what_depends_on_no_input() -> None:
    graph = graph_of(Table(), torch.randn(2, 4, 4))
    x = torch.randn(3, 4, 4)
    expected = graph.run(x)
    assert fold_constants(graph) == 2
    assert operators(graph) == ["aten.add.Tensor", "aten.add.Tensor"]
    assert torch.equal(graph.run(x), expected)
    assert fold_constants(graph) == 0


def test_fold_keeps_what_would_be_much_larger() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(1, 1).expand(2000, 1500).contiguous()

    graph = graph_of(Wide(), torch.randn(2, 2000, 1500))
    fold_constants(graph)
    assert "aten.expand.default" in operators(graph)


def test_fold_stores_no_weight_twice() -> None:
    class Both(nn.Module):
        def __init__(self, *, twice: bool) -> None:
            super().__init__()
            self.weight, self.twice = nn.Parameter(torch.randn(200, 200)), twice

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.t()
            return y @ self.weight if self.twice else y

    graph = graph_of(Both(twice=True), torch.randn(2, 200))
    fold_constants(graph)
    assert operators(graph).count("aten.t.default") == 1
    graph = graph_of(Both(twice=False), torch.randn(2, 200))
    fold_constants(graph)
    assert operators(graph) == ["aten.matmul.default"]
    assert [name for name in graph.tensors() if name.startswith("weight_")]


def test_fold_leaves_random_numbers_and_constants_written_into_by_inputs() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(4)

    graph = graph_of(Random(), torch.randn(2, 4))
    assert fold_constants(graph) == 0

    class Written(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            memory = torch.zeros(4)
            view = memory[1:]
            memory.copy_(x.sum(0))
            return memory, view

    graph = graph_of(Written(), torch.randn(2, 4))
    fold_constants(graph)
    assert "aten.copy_.default" in operators(graph)


@pytest.mark.parametrize("rows", [2, 3])
def test_functional_graph_computes_the_same_and_writes_nothing(rows: int) -> None:
    model = Writes().eval()
    graph = graph_of(model, torch.randn(2, 4, 4))
    x = torch.randn(rows, 4, 4)
    assert functionalise(graph) == []
    assert not any(written(node) for node in graph.nodes)
    for found, expected in zip(graph.run(x.clone()), model(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_state_that_is_written_is_reported() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    graph = graph_of(Counter(), torch.randn(2, 4))
    notes = functionalise(graph)
    assert len(notes) == 1
    assert "the model's tensor count" in notes[0]
    assert torch.equal(graph.run(torch.zeros(2, 4)), torch.ones(2, 4))
    assert torch.equal(graph.run(torch.zeros(2, 4)), torch.ones(2, 4))


def test_copy_is_not_taken_for_a_view() -> None:
    class Copied(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            base = x * 2
            moved = base.transpose(1, 2).reshape(x.shape[0], -1)
            base.add_(1)
            return base, moved

    model = Copied()
    graph = graph_of(model, torch.randn(2, 3, 4))
    functionalise(graph)
    x = torch.randn(3, 3, 4)
    for found, expected in zip(graph.run(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_write_through_an_expansion_is_refused() -> None:
    class Expanded(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            base = x.sum(1, keepdim=True)
            base.expand(-1, 1, 4).select(1, 0).unfold(1, 4, 1).add_(1)
            return base, x

    graph = graph_of(Expanded(), torch.randn(2, 3, 4))
    with pytest.raises(UnsupportedOperatorError, match=r"a write through unfold, a view by aten.unfold.default"):
        functionalise(graph)


def test_aliases_follow_views_to_their_root() -> None:
    graph = graph_of(Writes(), torch.randn(2, 4, 4))
    by_name = {node.name: node for node in graph.nodes}
    assert written(by_name["add_"]) == [by_name["select"]]
    assert root(by_name["add_"]) is by_name["mul"]
    assert source(by_name["mul"]) is None
    assert {by_name["select"], by_name["getitem"], by_name["view"]} <= set(family(by_name["mul"]))


def test_names_follow_the_signature() -> None:
    graph = graph_of(Nested(), (torch.randn(2, 4), {"shift": torch.randn(2, 4)}))
    assert names.input_names(graph)[:2] == ["pair.0", "pair.1.shift"]
    assert names.output_names(graph, 3) == ["logits", "states.0", "states.1"]
    assert names.unique(["a", "a", "b"], ["b"]) == ["a", "a_2", "b_2"]


def test_named_nodes_say_which_module_they_are_from() -> None:
    translated = translate(graph_of(Tied(), torch.randint(300, (2, 5))))
    assert [node.name for node in translated.skeleton.graph.node] == ["embed/Gather", "head/Transpose", "head/MatMul"]

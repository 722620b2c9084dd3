"""Check the steps of which rewriting passes are made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.editing import (
    add_tensor,
    copied,
    fresh_name,
    insert,
    is_random,
    read,
    readers,
    remove_dead,
    remove_tensor,
    replace,
    replace_tensor,
)
from graphopt.graph import OWNER, SPEC, Graph, Source, TensorSpec, get_attribute

aten = torch.ops.aten


class Model(nn.Module):
    """Two layers with one weight, a table that no call reads, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(torch.relu(self.first(x)), 0.5, self.training))


@pytest.fixture
def graph() -> Graph:
    return capture(Model().eval(), torch.randn(2, 4)).clone()


def node(graph: Graph, name: str) -> torch.fx.Node:
    return next(each for each in graph.nodes if each.name == name)


def test_an_inserted_call_is_typed_and_owned_like_another(graph: Graph) -> None:
    relu, linear = node(graph, "relu"), node(graph, "linear")
    new = insert(graph, relu, aten.mul.Tensor, (linear, 2.0), like=linear)
    assert new.meta == {SPEC: linear.meta[SPEC], OWNER: "first"}
    other = TensorSpec((2,), torch.int64, (False,))
    assert insert(graph, relu, aten.argmax.default, (linear, 1), like=relu, spec=other).meta[SPEC] == other
    assert insert(graph, relu, aten.mul.Tensor, (linear, 2.0), like=linear, spec=None).meta[SPEC] is None


def test_a_replacement_is_read_by_all_but_itself(graph: Graph) -> None:
    relu, linear, dropout = node(graph, "relu"), node(graph, "linear"), node(graph, "dropout")
    x = torch.randn(5, 4)
    bias = graph.tensor("second.bias")
    expected = bias + 3 * graph.run(x) - 3 * bias
    new = insert(graph, dropout, aten.mul.Tensor, (relu, 3.0), like=relu)
    replace(relu, new)
    assert list(relu.users) == [new]
    assert new.args == (relu, 3.0)
    assert linear.users == {relu: None}
    graph.module.recompile()
    assert torch.allclose(graph.run(x), expected)


def test_a_copy_keeps_the_arguments_of_training(graph: Graph) -> None:
    dropout, last = node(graph, "dropout"), node(graph, "linear_1")
    new = copied(graph, dropout, last)
    assert new.meta == dropout.meta
    assert new.meta is not dropout.meta
    assert is_random(new)
    assert not is_random(last)


def test_a_tensor_is_read_once(graph: Graph) -> None:
    relu, linear, last = (node(graph, name) for name in ("relu", "linear", "linear_1"))
    found = read(graph, "first.bias", relu)
    assert found.name == "first_bias"
    name = add_tensor(graph, "first.scale", torch.ones(4))
    assert name == "first.scale"
    new = read(graph, name, relu)
    assert new.meta == {SPEC: TensorSpec.of(torch.ones(4)), OWNER: relu.meta[OWNER]}
    assert read(graph, name, last) is new
    assert read(graph, name, linear) is not new  # runs before the first of them
    assert readers(graph, "first.weight") == [linear, last]
    assert readers(graph, name) == []


def test_names_are_fresh_and_the_same_each_time(graph: Graph) -> None:
    assert fresh_name(graph, "first.weight") == "first.weight_1"
    assert fresh_name(graph, "first.weight.left") == "first.weight_left"  # a tensor has no parts
    assert fresh_name(graph, "training") == "training_1"  # what a module itself needs
    assert fresh_name(graph, "new.part.weight") == "new.part.weight"
    assert [add_tensor(graph, "new.w", torch.ones(1)) for _ in range(3)] == ["new.w", "new.w_1", "new.w_2"]
    assert [add_tensor(graph, "first.weight.left", torch.ones(1)) for _ in range(2)] == [
        "first.weight_left",
        "first.weight_left_1",
    ]


def test_what_the_state_holds_is_said(graph: Graph) -> None:
    before = set(graph.module.state_dict())
    add_tensor(graph, "table", torch.ones(2))
    add_tensor(graph, "scratch", torch.ones(2), persistent=False)
    add_tensor(graph, "extra.weight", nn.Parameter(torch.ones(2)))
    assert set(graph.module.state_dict()) - before == {"table", "extra.weight"}
    assert "extra.weight" in dict(graph.module.named_parameters())
    assert "scratch" in dict(graph.clone().module.named_buffers())


def test_sources_are_kept_and_copied(graph: Graph) -> None:
    source = Source("first.weight", (4, 4), 0, torch.arange(4).numpy())
    name = add_tensor(graph, "half", torch.ones(4, 4), sources={0: (source,)})
    assert graph.clone().sources[name] == {0: (source,)}
    replace_tensor(graph, name, torch.zeros(4, 4), sources={1: (source,)})
    assert graph.sources[name] == {0: (source,), 1: (source,)}
    remove_tensor(graph, name)
    assert name not in graph.sources


def test_a_replaced_tensor_stays_a_parameter_under_all_its_names(graph: Graph) -> None:
    graph.tensor("first.weight").requires_grad_(False)
    replace_tensor(graph, "first.weight", torch.zeros(4, 4, dtype=torch.float64))
    for name in ("first.weight", "second.weight"):
        found = get_attribute(graph.module, name)
        assert isinstance(found, nn.Parameter)
        assert not found.requires_grad
        assert found.dtype is torch.float64
    assert node(graph, "second_weight").meta[SPEC].dtype is torch.float64


def test_a_removed_tensor_is_gone_under_all_its_names(graph: Graph) -> None:
    remove_tensor(graph, "first.weight")
    assert set(graph.module.state_dict()) == {"first.bias", "second.bias", "unused"}
    assert graph.aliases == {}


def test_dead_nodes_go_with_the_tensors_that_only_they_read(graph: Graph) -> None:
    relu, last = node(graph, "relu"), node(graph, "linear_1")
    replace(last, relu)
    removed = remove_dead(graph)
    assert removed.nodes == ("second_bias", "dropout", "linear_1")
    assert removed.tensors == ("second.bias",)
    assert set(graph.module.state_dict()) == {"first.weight", "second.weight", "first.bias", "unused"}
    x = torch.randn(3, 4)
    weight, bias = graph.tensor("first.weight"), graph.tensor("first.bias")
    assert torch.equal(graph.run(x), torch.relu(nn.functional.linear(x, weight, bias)))
    assert remove_dead(graph) == type(removed)((), ())


def test_a_graph_from_before_keeps_its_tensors(graph: Graph) -> None:
    before = graph.clone()
    text = before.text()
    replace(node(graph, "linear_1"), node(graph, "relu"))
    remove_dead(graph)
    assert before.text() == text
    assert set(before.module.state_dict()) == {"first.weight", "second.weight", "first.bias", "second.bias", "unused"}


class Writes(nn.Module):
    """Write into a local table that is read, into one that is not, into a buffer, and into an input."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, x: Tensor, log: Tensor) -> Tensor:
        read, unread = torch.zeros(3, 4), torch.zeros(3, 4)
        read[:, 1:3] = 2.0
        unread[:, 1:3] = 2.0
        self.steps.add_(1.0)
        log[0].mul_(2.0)
        return x + read


def test_writes_stay_where_somebody_can_see_them() -> None:
    graph = capture(Writes(), (torch.randn(3, 4), torch.ones(2, 2))).clone()
    unread = [each for each in graph.nodes if each.target is aten.zeros.default][1]
    removed = remove_dead(graph)
    assert unread.name in removed.nodes
    assert sum(each.target is aten.zeros.default for each in graph.nodes) == 1
    x, log = torch.randn(3, 4), torch.ones(2, 2)
    expected = x.clone()
    expected[:, 1:3] += 2.0
    assert torch.equal(graph.run(x, log), expected)
    assert torch.equal(log, torch.tensor([[2.0, 2.0], [1.0, 1.0]]))
    assert graph.tensor("steps").tolist() == [1.0, 1.0]

"""Which operators allocate, and how long what they allocate lives."""

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.cost.liveness import allocations
from graphopt.graph import Graph


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    return capture(module, inputs)


def names(graph: Graph) -> list[str]:
    return [str(a.node.target) for a in allocations(graph) if a.node.op != "placeholder"]


class Views(nn.Module):
    """Everything here but the relu is a view, in place, or idle."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        first, second = y.chunk(2, dim=1)
        y = first.add_(second)
        y = self.dropout(y.transpose(1, 2).flatten(1).unsqueeze(0)[:, :, 1:])
        return y.expand(3, -1, -1)


def test_views_and_in_place_operators_allocate_nothing() -> None:
    assert names(graph_of(Views().eval(), torch.randn(2, 4, 3))) == ["aten.relu.default"]


class Converted(nn.Module):
    """Converts its input there and not back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).to(torch.float64)


def test_a_conversion_allocates_only_where_it_converts() -> None:
    # The second conversion changes nothing, and is a view of the first, if the export keeps it at all.
    assert len(names(graph_of(Converted(), torch.randn(2, 3)))) == 1


class Sorted(nn.Module):
    """Makes two tensors in one operator and uses one."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.topk(x, 2, dim=1).values + 1
        return result


def test_an_operator_with_several_results_allocates_them_all() -> None:
    assert names(graph_of(Sorted(), torch.randn(2, 5))) == ["aten.topk.default", "aten.add.Tensor"]


class Late(nn.Module):
    """Reads a view of its first result at the very end."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(x)
        view = first.t()
        second = torch.tanh(x)
        third = torch.sigmoid(second)
        result: Tensor = view + third.t()
        return result


def test_an_allocation_lives_until_its_last_view_is_read() -> None:
    graph = graph_of(Late(), torch.randn(3, 3))
    steps = {node: i for i, node in enumerate(graph.nodes)}
    found = {str(a.node.target): a for a in allocations(graph)}
    addition = next(n for n in graph.nodes if str(n.target) == "aten.add.Tensor")
    output = next(n for n in graph.nodes if n.op == "output")
    assert found["aten.relu.default"].last == steps[addition]
    assert found["aten.tanh.default"].last < steps[addition]
    assert found["aten.add.Tensor"].last == steps[output]
    placeholder = next(a for a in allocations(graph) if a.node.op == "placeholder")
    assert (placeholder.first, placeholder.last) == (0, found["aten.tanh.default"].first)

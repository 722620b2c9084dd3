"""Check the pass that computes once what is computed several times."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects.aten import infer
from graphopt.passes import FoldConstants, MergeDuplicates, RemoveIdentities
from graphopt.pipeline import Context
from graphopt.testing import Trial, try_pass
from tests.random_graphs import Sample, samples


def left(done: Trial) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in done.after.nodes if node.op == "call_function"]


def reasons(done: Trial) -> dict[str, str]:
    return {site.name: site.reason for site in done.skipped}


# -- text -----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Compute one thing twice, another with other arguments, and a third to return it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(self.a(x)) * torch.sigmoid(torch.relu(self.a(x)))
        z = self.b(y).softmax(0) + self.b(y).softmax(-1)
        return z, torch.exp(z), torch.exp(z)


def test_text() -> None:
    done = try_pass(MergeDuplicates(), Twice(), torch.randn(3, 4, dtype=torch.float64))
    assert done.text().splitlines() == [
        "-%linear_1: float64[3?, 4] = aten.linear.default(%x, %a_weight, %a_bias)",
        "-%relu_1: float64[3?, 4] = aten.relu.default(%linear_1)",
        "-%sigmoid: float64[3?, 4] = aten.sigmoid.default(%relu_1)",
        "+%sigmoid: float64[3?, 4] = aten.sigmoid.default(%relu)",
        "-%linear_3: float64[3?, 4] = aten.linear.default(%mul, %b_weight, %b_bias)",
        "-%softmax_1: float64[3?, 4] = aten.softmax.int(%linear_3, -1)",
        "+%softmax_1: float64[3?, 4] = aten.softmax.int(%linear_2, -1)",
    ]
    assert [(site.name, site.reason) for site in done.applied] == [
        ("linear_1", "is linear"),
        ("relu_1", "is relu"),
        ("linear_3", "is linear_2"),
    ]
    assert reasons(done) == {"exp_1": "it is returned, and so is exp: they must not share memory"}
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


# -- calls ------------------------------------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    done = try_pass(MergeDuplicates(), Of(lambda x: x + torch.rand(3) + torch.rand(3)), torch.randn(2, 3))
    assert left(done).count("rand.default") == 2


def test_dropouts_are_drawn_as_often_as_before() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.5, self.training) + functional.dropout(x, 0.5, self.training)

    done = try_pass(MergeDuplicates(), Drops().eval(), torch.randn(2, 3))
    assert left(done).count("dropout.default") == 2


def test_equal_calls_before_and_after_a_write_differ() -> None:
    def function(x: Tensor) -> Tensor:
        y = 2 * x
        before = y.exp()
        z = y.view(-1)
        z.add_(1.0)
        return before + y.exp() + x.sin() + x.sin() + y.cos() + y.cos()

    done = try_pass(MergeDuplicates(), Of(function), torch.randn(2, 3))
    assert [left(done).count(f"{name}.default") for name in ("sin", "cos", "exp")] == [1, 1, 2]
    assert done.difference() < 1e-12


def test_tables_that_are_written_into_are_not_shared() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = torch.zeros(3), torch.zeros(3)
        a[0] = 1.0
        return x + a * 2 + b

    done = try_pass(MergeDuplicates(), Of(function), torch.randn(2, 3))
    assert left(done).count("zeros.default") == 2
    assert done.difference() < 1e-12


def test_equal_numbers_of_other_types_are_other_arguments() -> None:
    def function(x: Tensor) -> Tensor:
        n = torch.arange(3)
        return (n * 2).float().sum() + (n * 2.0).sum() + x + (n * True).sum()

    done = try_pass(MergeDuplicates(), Of(function), torch.randn(2, 3))
    assert left(done).count("mul.Tensor") == 3


def test_sizes_are_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        return (x.view(x.shape[0] * 3) + 1).view(x.shape[0] * 3, 1)

    done = try_pass(MergeDuplicates(), Of(function), torch.randn(2, 3))
    assert left(done).count("sym_size.int") <= 1
    assert left(done).count("<built-in function mul>") <= 1
    assert torch.equal(done.after.run(torch.ones(5, 3)), torch.full((15, 1), 2.0))


# -- tables -----------------------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """Hold equal tables: two masks, two scales of free widths, two parameters, two counters."""

    mask1: Tensor
    mask2: Tensor
    scale1: Tensor
    scale2: Tensor
    steps1: Tensor
    steps2: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        for name, value in {"mask": torch.ones(4, 4).tril(), "scale": torch.rand(4), "steps": torch.zeros(1)}.items():
            self.register_buffer(f"{name}1", value.clone())
            self.register_buffer(f"{name}2", value.clone())
        self.gain1, self.gain2 = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps1.add_(1.0)
        y = self.b(torch.relu(self.a(x)) * self.scale1)
        y = self.c(torch.relu(y) * self.scale2) * self.gain1 * self.gain2
        return (y @ y.mT * self.mask1) @ (y @ y.mT * self.mask2) + self.steps1 + self.steps2


def test_equal_tables_become_one_under_both_names() -> None:
    done = try_pass(MergeDuplicates(), Tables().double(), torch.randn(3, 4, 4, dtype=torch.float64))
    assert [(site.name, site.reason) for site in done.applied] == [
        ("mask2", "is mask1"),
        ("m_t_1", "is m_t"),
        ("matmul_1", "is matmul"),
        ("mul_5", "is mul_4"),
    ]
    assert done.after.aliases["mask2"] == "mask1"
    state = done.after.module.state_dict(keep_vars=True)
    assert state.keys() == done.before.module.state_dict().keys()
    assert state["mask1"] is state["mask2"]
    assert state["gain1"] is not state["gain2"]
    assert done.difference() < 1e-12
    assert done.again().unchanged


def test_groups_stay_free_of_each_other() -> None:
    done = try_pass(MergeDuplicates(), Tables().double(), torch.randn(3, 4, 4, dtype=torch.float64))
    assert reasons(done)["scale2"] == ("as scale1 it would tie what is free of each other: a.weight[0] and b.weight[0]")
    assert [g.name for g in infer(done.after).groups] == [g.name for g in infer(done.before).groups]


def test_what_a_call_writes_into_stays_its_own() -> None:
    done = try_pass(MergeDuplicates(), Tables(), torch.randn(3, 4, 4))
    before, after = copy.deepcopy(done.before.module), copy.deepcopy(done.after.module)
    x = torch.randn(2, 4, 4)
    for _ in range(3):
        assert torch.equal(before(x), after(x))


def test_running_statistics_stay_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    done = try_pass(MergeDuplicates(), model, torch.randn(3, 4))
    assert done.unchanged


def test_empty_and_undefined_entries_compare_as_they_are() -> None:
    class Odd(nn.Module):
        e1: Tensor
        e2: Tensor
        i1: Tensor
        i2: Tensor
        n1: Tensor
        n2: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name, value in {
                "e1": torch.zeros(0, 2), "e2": torch.zeros(0, 2), "i1": torch.full((2,), torch.inf),
                "i2": torch.tensor([torch.inf, -torch.inf]), "n1": torch.full((2,), torch.nan),
                "n2": torch.full((2,), torch.nan),
            }.items():  # fmt: skip
                self.register_buffer(name, value)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (torch.cat([self.e1, x, self.e2]), x + self.i1, x + self.i2, x + self.n1, x + self.n2)

    done = try_pass(MergeDuplicates(), Odd(), torch.randn(3, 2))
    assert [site.name for site in done.applied] == ["e2"]
    assert done.difference() < 1e-12


def test_models_without_values_are_taken() -> None:
    with graphopt.without_weights():
        model = Twice()
    graph = capture(model.eval(), torch.randn(3, 4, dtype=torch.float64))
    assert graph.hollow
    for each in (RemoveIdentities(), MergeDuplicates()):
        assert not each.needs_values
        graph = each.run(graph.clone(), Context(original=CostModel(infer(graph)).cost())).graph
    assert [str(node.target) for node in graph.nodes].count("aten.linear.default") == 2


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples())
def test_random_graphs_compute_the_same(sample: Sample) -> None:
    note(repr(sample))
    graph = capture(sample.module.double().eval(), sample.inputs)
    done = try_pass(MergeDuplicates(), try_pass(FoldConstants(trainable=True), graph).after)
    assert done.difference() < 1e-9
    assert done.again().unchanged
    assert sorted(g.name for g in infer(done.after).groups) == sorted(g.name for g in infer(done.before).groups)

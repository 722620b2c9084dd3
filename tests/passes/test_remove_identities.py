"""Check the pass that takes out what computes nothing: its text, its meaning, its refusals, its properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import RemoveIdentities
from graphopt.passes.canonicalize.identities import RULES
from graphopt.testing import Trial, try_pass
from tests.random_graphs import Sample, samples


class Function(nn.Module):
    """A function of tensors, between two linear layers, so that damage can be done."""

    def __init__(self, function: Callable[..., Any], width: int = 6) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.function(self.first(x)))


def trial(function: Callable[..., Any], *shape: int, trainable: bool = False, dynamic: bool = True) -> Trial:
    """Run the pass on a function that keeps the last dimension, 6."""
    model = Function(function).train().eval()
    inputs = torch.randn(*(shape or (3, 4, 6)), generator=torch.Generator().manual_seed(0))
    graph = capture(model, inputs) if dynamic else capture(model, inputs, dynamic=None)
    return try_pass(RemoveIdentities(trainable), graph)


def left(done: Trial) -> list[str]:
    """Return the operators that are left between the linear layers."""
    calls = [str(node.target) for node in done.after.nodes if node.op == "call_function"]
    assert calls[0] == calls[-1] == "aten.linear.default"
    return [name.removeprefix("aten.") for name in calls[1:-1]]


# -- text -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What a vision transformer leaves behind: dropouts, copies, slices of everything, reshapes one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.first(x))[:, :100]
        y = y.transpose(1, 2).contiguous().view(-1, 4, 2, 5).view(-1, 8, 5).transpose(1, 2)
        return self.last(functional.pad(y.float(), (0, 0)))


def test_text() -> None:
    done = try_pass(RemoveIdentities(), Block().eval(), torch.randn(3, 5, 6))
    assert done.text().splitlines() == TEXT
    assert [(site.name, site.reason) for site in done.applied] == [
        ("dropout", "dropout in evaluation"),
        ("slice_1", "takes all of dimension 0"),
        ("contiguous", "changes the layout only"),
        ("view_1", "undoes view"),
        ("transpose_1", "undoes transpose"),
        ("to", "casts to float32, which it is"),
        ("pad", "pads nothing"),
    ]
    assert done.difference() < 1e-12
    assert done.notices_damage()


TEXT = [
    "-%dropout: float32[3?, 5, 8] = aten.dropout.default(%linear, 0.1, False)",
    "-%slice_1: float32[3?, 5, 8] = aten.slice.Tensor(%dropout, 0, 0, 9223372036854775807)",
    "-%transpose: float32[3?, 8, 5] = aten.transpose.int(%slice_1, 1, 2)",
    "-%contiguous: float32[3?, 8, 5] = aten.contiguous.default(%transpose)",
    "-%view: float32[3?, 4, 2, 5] = aten.view.default(%contiguous, [-1, 4, 2, 5])",
    "-%view_1: float32[3?, 8, 5] = aten.view.default(%view, [-1, 8, 5])",
    "-%transpose_1: float32[3?, 5, 8] = aten.transpose.int(%view_1, 1, 2)",
    "-%to: float32[3?, 5, 8] = aten.to.dtype(%transpose_1, torch.float32)",
    "-%pad: float32[3?, 5, 8] = aten.pad.default(%to, [0, 0])",
    "-%linear_1: float32[3?, 5, 2] = aten.linear.default(%pad, %last_weight, %last_bias)",
    "+%linear_1: float32[3?, 5, 2] = aten.linear.default(%linear, %last_weight, %last_bias)",
]


def test_training_keeps_what_acts_in_training() -> None:
    done = try_pass(RemoveIdentities(trainable=True), Block().eval(), torch.randn(3, 5, 6))
    assert [(site.name, site.reason) for site in done.skipped] == [
        ("dropout", "drops with p=0.1 in training (trainable=false takes it out)")
    ]
    assert left(done) == ["dropout.default"]
    done.after.module.train()
    x = torch.randn(3, 5, 6)
    assert not torch.equal(done.after.module(x), done.after.module(x))


# -- what is taken out, and what is not -------------------------------------------------------------------------------

NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout of nothing": lambda x: functional.dropout(x, 0.0, training=True),
    "alias": lambda x: torch.ops.aten.alias(x),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous twice": lambda x: x.contiguous().contiguous(),
    "cast": lambda x: x.to(torch.float32),
    "cast and move": lambda x: x.to(device="cpu", dtype=torch.float32),
    "cast there and back": lambda x: x.double().float(),
    "cast like": lambda x: x.type_as(x),
    "add": lambda x: x + 0,
    "subtract": lambda x: x - 0.0,
    "multiply": lambda x: 1 * x,
    "divide": lambda x: x / 1.0,
    "power": lambda x: x**1,
    "slice": lambda x: x[:, 0:4],
    "slices": lambda x: x[:, :, 0:][..., :100],
    "pad": lambda x: functional.pad(x, (0, 0, 0, 0)),
    "reflect": lambda x: functional.pad(x, (0, 0), mode="reflect"),
    "join": lambda x: torch.cat([x], 1),
    "roll": lambda x: torch.roll(x, (0, 0), (0, 1)),
    "repeat": lambda x: x.repeat(1, 1, 1),
    "expand": lambda x: x.expand(-1, 4, 6),
    "split": lambda x: torch.split(x, 4, 1)[0],
    "chunk": lambda x: torch.chunk(x, 1, 2)[0],
    "view": lambda x: x.view(-1, 4, 6),
    "view there and back": lambda x: x.view(-1, 2, 2, 6).view(-1, 4, 6),
    "flatten and unflatten": lambda x: x.flatten(1).unflatten(1, (4, 6)),
    "squeeze and unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze what is wide": lambda x: x.squeeze(1),
    "permute": lambda x: x.permute(0, 1, 2),
    "transpose twice": lambda x: x.transpose(1, 2).transpose(2, 1),
    "permute and transpose": lambda x: x.permute(0, 2, 1).mT,
    "pool": lambda x: functional.avg_pool1d(x, 1),
    "pool to the same size": lambda x: functional.adaptive_avg_pool1d(x, 6),
    "resample": lambda x: functional.interpolate(x, scale_factor=1.0, mode="linear"),
    "resample to the same size": lambda x: functional.interpolate(x, size=6),
}

SOMETHING: dict[str, Callable[[Tensor], Tensor]] = {
    "a narrow cast": lambda x: x.half().float(),
    "an active dropout of little": lambda x: functional.dropout(x, 1e-30, training=True),
    "a slice": lambda x: x[:, 1:],
    "a slice with gaps": lambda x: x[:, ::2],
    "padding": lambda x: functional.pad(x, (0, 0, 1, 0)),
    "a transpose": lambda x: x.permute(0, 2, 1).repeat(1, 1, 2)[..., :6],
    "a shape": lambda x: x.view(-1, 3, 2, 4).mean(3).repeat(1, 1, 3),
    "a roll": lambda x: torch.roll(x, 1, 1),
    "a sum with broadcasting": lambda x: x[:, :1].squeeze(1) + 0,
    "a rectifier": lambda x: torch.relu(x),
    "a scaled pool": lambda x: functional.interpolate(x, scale_factor=0.5, mode="linear").repeat(1, 1, 2),
    "an integer power": lambda x: x**2,
    "a bool": lambda x: (x > 0) + 0.5,
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_left_of_what_computes_nothing(name: str) -> None:
    done = trial(NOTHING[name])
    assert left(done) == []
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


@pytest.mark.parametrize("name", SOMETHING)
def test_what_computes_something_stays(name: str) -> None:
    done = trial(SOMETHING[name])
    assert left(done)
    if "dropout" not in name:
        assert done.difference() < 1e-12


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(-1, 24).view(-1, 2, 12).view(-1, 8, 3).mean(2)[:, :6], ["reshape.default"]),
        (lambda x: x.permute(2, 0, 1).permute(1, 0, 2).repeat(1, 1, 2)[:, :, :6], ["permute.default"]),
        (lambda x: x.half().float().double().float(), ["to.dtype", "to.dtype"]),
        (lambda x: torch.relu(torch.relu(torch.relu(x))), ["relu.default"]),
        (lambda x: torch.relu(functional.dropout(torch.relu(x), 0.3, False)), ["relu.default"]),
        (lambda x: x.clamp(-1, 1).clamp(-1, 1), ["clamp.default"]),
        (lambda x: x.clamp(-1, 1).clamp(-1, 2), ["clamp.default", "clamp.default"]),
        (lambda x: x.abs().sqrt().floor().floor(), ["abs.default", "sqrt.default", "floor.default"]),
    ],
)
def test_chains_become_short(function: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    done = trial(function)
    assert [name for name in left(done) if name in expected or "view" in name] == expected
    assert done.difference() < 1e-12
    assert done.again().unchanged


def test_a_repetition_of_a_rectifier_in_place_goes() -> None:
    done = trial(lambda x: functional.relu(functional.relu(x, inplace=True), inplace=True))
    assert left(done) == ["relu_.default"]
    assert done.difference() < 1e-12


def test_no_shape_is_taken_for_another_that_is_equal_by_chance() -> None:
    """Both dimensions vary, and the view yields the shape of the example by chance."""

    class Swap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2 * x.shape[1], x.shape[0] // 2) * 2

    graph = capture(Swap(), torch.randn(6, 5), dynamic={"x": {0: "a", 1: "b"}}).clone()
    for name in ("x", "view"):
        node = graph_node(graph, name)
        node.meta["spec"] = node.meta["spec"].resized((4, 2))
    done = try_pass(RemoveIdentities(), graph)
    x = torch.randn(12, 7)
    assert torch.equal(done.after.run(x), x.view(14, 6) * 2)


# -- memory -----------------------------------------------------------------------------------------------------------


def refusal(done: Trial) -> str:
    (site,) = done.skipped
    return site.reason


def test_a_copy_stays_where_the_original_is_written_into() -> None:
    def function(x: Tensor) -> Tensor:
        before = x.clone()
        x[:, 0].mul_(2.0)
        return x + 3 * before

    done = trial(function)
    assert "clone.default" in left(done)
    assert refusal(done) == "mul_ writes into linear later, which the other must not see"
    assert done.difference() < 1e-12


def test_a_copy_stays_where_it_is_written_into() -> None:
    def function(x: Tensor) -> Tensor:
        after = x.clone()
        after[:, 0].mul_(2.0)
        return x + 3 * after

    done = trial(function)
    assert "clone.default" in left(done)
    assert done.difference() < 1e-12


def test_a_copy_goes_where_nobody_writes_any_more() -> None:
    done = trial(lambda x: 3 * x.mul_(2.0).clone())
    assert left(done) == ["mul_.Tensor", "mul.Tensor"]
    assert done.difference() < 1e-12


def test_a_projection_is_repeated_after_a_write() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.relu(x)
        z = y.view(-1, 24)
        z.sub_(0.5)
        return torch.relu(y)

    done = trial(function)
    assert left(done).count("relu.default") == 2
    assert done.difference() < 1e-12


def test_what_is_returned_has_memory_of_its_own() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = torch.relu(x)
            return x.clone(), self.table.clone(), y, y.clone(), (2 * x).clone()

    done = try_pass(RemoveIdentities(), Returns(), torch.randn(2, 3))
    assert {site.name: site.reason for site in done.skipped} == {
        "clone": "it is returned, and x must not share its memory",
        "clone_1": "it is returned, and table must not share its memory",
        "clone_2": "it is returned, and relu must not share its memory",
    }
    assert [site.name for site in done.applied] == ["clone_3"]
    x = torch.randn(2, 3)
    results = done.after.run(x)
    kept = [x.clone(), *(result.clone() for result in results)]
    results[1].zero_()
    results[3].zero_()
    results[0].zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(results[2], kept[3])
    assert torch.equal(done.after.tensor("table"), kept[2])


def test_a_layout_that_two_readers_share_stays() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.transpose(1, 2).contiguous()
        return (y.relu() + y.sigmoid()).transpose(1, 2)

    done = trial(function)
    assert refusal(done) == "each of its 2 readers would arrange the memory for itself"


def test_a_layout_that_an_operator_reads_stays() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.transpose(1, 2).contiguous().relu()
        return torch.as_strided(y, (3, 4, 6), (24, 6, 1))

    done = trial(function, dynamic=False)
    assert refusal(done) == "as_strided (aten.as_strided.default) reads how memory is laid out"
    assert done.difference() < 1e-12


def test_a_view_that_is_written_through_stays_one() -> None:
    def function(x: Tensor) -> Tensor:
        y = (x * 2).transpose(1, 2).contiguous()
        y.view(-1, 24).relu_()
        return y.transpose(1, 2)

    done = trial(function)
    assert "view.default" in left(done)
    assert done.difference() < 1e-12


# -- dead code --------------------------------------------------------------------------------------------------------


def test_dead_code_goes_with_its_tensors() -> None:
    graph = capture(Block().eval(), torch.randn(3, 5, 6)).clone()
    output = graph.module.graph.output_node()
    output.args = ((graph_node(graph, "linear"),),)
    graph.module.recompile()
    done = try_pass(RemoveIdentities(), graph)
    assert done.applied[0].name == "dead code"
    assert done.applied[0].facts["tensors"] == ["last.bias", "last.weight"]
    assert set(done.after.module.state_dict()) == {"first.weight", "first.bias"}
    assert done.difference() < 1e-12


def graph_node(graph: Graph, name: str) -> Any:
    return next(node for node in graph.nodes if node.name == name)


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples())
def test_random_graphs_compute_the_same(sample: Sample) -> None:
    note(repr(sample))
    graph = capture(sample.module.double().eval(), sample.inputs)
    done = try_pass(RemoveIdentities(), graph)
    assert done.difference() < 1e-9
    assert done.again().unchanged
    assert sorted(g.size for g in infer(done.after).groups) == sorted(g.size for g in infer(graph).groups)


links = st.lists(st.sampled_from(sorted(NOTHING)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(links)
def test_whatever_computes_nothing_computes_nothing_together(names: list[str]) -> None:
    def function(x: Tensor) -> Tensor:
        for name in names:
            x = NOTHING[name](x)
        return x

    done = trial(function)
    assert left(done) == []
    assert done.again().unchanged


def test_every_rule_is_of_an_operator() -> None:
    assert len(RULES) > 60
    assert all(callable(target) for target in RULES)

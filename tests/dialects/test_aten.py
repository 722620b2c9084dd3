"""The ATen dialect: every operator by itself, on parameters and on values that do not vanish."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.axes.algebra import leaves
from graphopt.axes.infer import Operator
from graphopt.dialects import aten as dialect
from graphopt.dialects.aten import OPERATORS, infer
from graphopt.dialects.aten.contraction import late_operators
from graphopt.graph import SPEC, Graph, TensorSpec, TraceModule, set_tensor
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs
from tests.dialects.alone import assert_zero, variants
from tests.dialects.checks import EXACT, check, reasons, typed
from tests.dialects.samples import RANDOM, WITHOUT_TENSORS, calls

aten = torch.ops.aten
NAMES = [
    line.split()[0]
    for line in Path(__file__).with_name("operators.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
ELSEWHERE = {
    "getitem": "has no schema",
    "wrap_with_set_grad_enabled": "is inlined by capture",
    "transformers.grouped_mm_fallback.default": "exists once its library is imported",
}


def short(target: Any) -> str:
    """Return an operator's name without its namespace."""
    return str(target).removeprefix("aten.")


TARGETS = [t for t in OPERATORS if hasattr(t, "_schema")]


def test_every_operator_of_the_sixty_models_has_an_entry() -> None:
    assert len(NAMES) == len(set(NAMES)) == 129
    known = {short(target) for target in OPERATORS}
    assert [name for name in NAMES if name not in known and name not in ELSEWHERE] == []
    assert operator.getitem in OPERATORS


def test_every_entry_is_an_operator_on_tensors() -> None:
    assert len(TARGETS) > 400
    for target in TARGETS:
        types = {str(value.type) for value in (*target._schema.arguments, *target._schema.returns)}
        assert any("Tensor" in each for each in types), target


# -- one operator in a graph of its own --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=short)
def test_an_operator_by_itself(target: Any) -> None:
    """Its rule gives axes of the result's sizes, what it calls zero is zero, and its rewritten calls are right."""
    if short(target) in WITHOUT_TENSORS:
        return
    for graph, call in (each for sample in calls(target) for each in variants(target, sample)):
        typing = infer(graph)
        assert typing.unknown == [], "the rule does not fit"
        for group in typing.groups:
            keep = {group.atom: np.arange(0, group.size, 2)}
            if not group.normalised:
                assert_zero(typing, call, keep)
            if short(target) not in RANDOM:
                expected = masked_outputs(typing, keep, (), {}, double=True)
                found = evaluate(rewrite(typing, keep), (), {}, double=True)
                gap = difference(expected, found, double=True)
                assert gap.relative < EXACT, f"{group}: {gap}"


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_duplicate_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {aten.relu.default: Operator(lambda t, call: None)}
    twice = SimpleNamespace(OPERATORS=entries, __name__="graphopt.dialects.aten.twice")
    monkeypatch.setattr(dialect, "_FAMILIES", (*dialect._FAMILIES, twice))
    with pytest.raises(ValueError, match=r"aten\.relu\.default has two entries .* keep the one in graphopt.*twice"):
        dialect._merge()


@torch.library.custom_op("graphopt_tests::strange", mutates_args=())
def strange(x: Tensor, y: Tensor) -> Tensor:
    """Do what no rule knows."""
    return x * y.flip(-1)


@strange.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


class Strange(nn.Module):
    """Call an unknown operator between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(5, 6), nn.Linear(6, 7), nn.Parameter(torch.zeros(6))
        self.free = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.last(strange(self.first(x), self.scale)))


def test_an_unknown_operator_freezes_what_it_touches() -> None:
    found = check(Strange(), [torch.randn(3, 5).double()])
    assert [str(node.target) for node in found.typing.unknown] == ["graphopt_tests.strange.default"]
    why = {"graphopt_tests.strange.default has no axis rule"}
    assert reasons(found.typing, "first.weight", 0) == reasons(found.typing, "scale", 0) == why
    assert reasons(found.typing, "last.weight", 1) == why
    assert [g.size for g in found.typing.groups] == [7]


def test_an_operator_can_be_taught() -> None:
    target = torch.ops.graphopt_tests.strange.default
    typing = typed(Strange(), torch.randn(3, 5).double())

    def type_(t: Any, call: Any) -> Any:
        x, y = t[call["x"]], t[call["y"]]
        t.freeze(y[-1], "reversed")
        return tuple(
            t.unify(a, b) if i == len(x) - 1 else a for i, (a, b) in enumerate(zip(x, (*x[:-1], y[-1]), strict=True))
        )

    taught = infer(typing.graph, {target: Operator(type_)})
    assert taught.unknown == []
    assert reasons(taught, "first.weight", 0) == {"reversed"}


def test_a_rule_that_does_not_fit_freezes_like_an_unknown_operator() -> None:
    typing = typed(Strange(), torch.randn(3, 5).double())
    wrong = infer(typing.graph, {aten.linear.default: Operator(lambda t, call: t[call["input"]])})
    assert [n.name for n in wrong.unknown] == ["linear", "strange", "linear_1", "linear_2"]
    assert wrong.groups == []
    assert reasons(wrong, "last.weight", 0) == {"the axis rule of aten.linear.default does not fit this call"}


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: nn.LSTM(5, 4, batch_first=True, bidirectional=True, num_layers=2), 8),
        (lambda: nn.LSTM(5, 4, batch_first=True, proj_size=3), 3),
        (lambda: nn.GRU(5, 4, batch_first=True), 4),
        (lambda: nn.RNN(5, 4, batch_first=True, nonlinearity="relu"), 4),
    ],
)
def test_recurrent_layers_are_frozen_whole_with_a_reason(make: Callable[[], nn.Module], width: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(3, 5), make()
            self.up, self.last = nn.Linear(width, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.layer(self.first(x))[0]).relu())

    found = check(Recurrent(), [torch.randn(2, 4, 3).double()])
    assert [g.size for g in found.typing.groups] == [6]
    assert found.typing.unknown == []
    why = {"a recurrent layer packs gates, directions and layers into one width"}
    for name, axes in found.typing.tensors.items():
        if name.startswith("layer."):
            for dim in range(len(axes)):
                assert reasons(found.typing, name, dim) == why
    assert reasons(found.typing, "first.weight", 0) == why


def test_operators_of_libraries_are_found_late() -> None:
    targets = late_operators()
    assert aten._grouped_mm.default in targets
    assert not targets.keys() & OPERATORS.keys()


def test_rows_sorted_by_expert() -> None:
    (target, entry) = next((t, e) for t, e in late_operators().items() if t is aten._grouped_mm.default)
    module = TraceModule(nn.Module(), fx.Graph())
    graph = fx.Graph()
    nodes = []
    for name, value in (("x", torch.zeros(6, 4)), ("weight", torch.zeros(3, 4, 5)), ("ends", torch.tensor([2, 3, 6]))):
        set_tensor(module, name, nn.Parameter(value) if value.is_floating_point() else value)
        nodes.append(graph.get_attr(name))
        nodes[-1].meta[SPEC] = TensorSpec.of(value)
    call = graph.call_function(target, tuple(nodes))
    call.meta[SPEC] = TensorSpec((6, 5), torch.float32, (False, False))
    graph.output((call,))
    module.graph = graph
    typing = infer(Graph(module, ((), {})), {target: entry})
    (group,) = typing.groups
    assert [str(p) for p in group.places] == ["x[1]", "weight[1]"]
    assert reasons(typing, "weight", 0) == {"an expert is chosen by data"}
    assert [leaf.size for leaf in leaves(typing.tensors["weight"][2])] == [5]

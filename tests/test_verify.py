"""Masked equivalence: what it catches, and how far apart results are said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt import verify
from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.rewrite import rewrite
from graphopt.verify import TOLERANCE, Difference, difference, equivalence, evaluate, masked_equivalence, masked_outputs

F32, F64 = torch.float32, torch.float64


class Block(nn.Module):
    """Attention with a table of relative positions, then a normalised residual perceptron."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)
        self.table = nn.Parameter(torch.zeros(7, 3))
        self.register_buffer("position", (torch.arange(4)[:, None] - torch.arange(4)) + 3)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.table[self.position].permute(2, 0, 1))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def pruned() -> tuple[Typing, dict[Atom, Indices], Graph]:
    """Return a typed float32 model, an uneven plan for all of its groups, and the rewritten graph."""
    module = Block()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    typing = infer(capture(module, (torch.randn(2, 4, 6),)))
    kept = {"heads": [0, 2], "head dim": [0, 1, 3], "channels": [0, 3, 4, 9, 15]}
    keep = {g.atom: np.array(kept[g.role]) for g in typing.groups}
    return typing, keep, rewrite(typing, keep)


def test_a_right_rewrite_passes_in_single_and_in_double() -> None:
    typing, keep, graph = pruned()
    assert len(keep) == 3
    found = masked_equivalence(typing, keep, graph)
    assert (found.equal, found.precision) == (True, F32)
    args, kwargs = typing.graph.example_inputs
    masked = masked_outputs(typing, keep, args, kwargs, double=True)
    assert difference(masked, evaluate(graph, args, kwargs, double=True), double=True).relative < 1e-13
    other: tuple[tuple[Tensor], dict[str, Tensor]] = ((torch.randn(5, 4, 6),), {})
    assert masked_equivalence(typing, keep, graph, other).equal


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        graph.set_tensor(name, nn.Parameter(change(graph.tensor(name).detach().clone())))

    return mutate


def _swapped(dim: int) -> Callable[[Tensor], Tensor]:
    def swap(t: Tensor) -> Tensor:
        order = torch.arange(t.shape[dim])
        order[[0, 1]] = order[[1, 0]]
        return t.index_select(dim, order)

    return swap


def _one(t: Tensor) -> Tensor:
    t.view(-1)[0] *= 1.01
    return t


def _rescaled(graph: Graph) -> None:
    attention = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = graph.module.graph.find_nodes(op="call_function", target=attention)
    node.update_kwarg("scale", node.kwargs["scale"] * 1.001)
    graph.module.recompile()


@pytest.mark.parametrize(
    "mutate",
    [
        _set("up.weight", _one),
        _set("qkv.bias", _one),
        _set("table", _swapped(1)),
        _set("table", lambda t: t * (1 + 1e-3)),
        _set("down.weight", _swapped(1)),
        _set("qkv.weight", _swapped(0)),
        _rescaled,
    ],
)
def test_a_wrong_rewrite_is_caught(mutate: Callable[[Graph], None]) -> None:
    typing, keep, graph = pruned()
    mutate(graph)
    found = masked_equivalence(typing, keep, graph)
    assert not found.equal
    assert found.precision is F64


def test_other_indices_than_planned_are_caught() -> None:
    typing, keep, _ = pruned()
    for atom, kept in keep.items():
        for other in range(atom.size):
            if other not in kept:
                wrong = {**keep, atom: np.sort(np.append(kept[1:], other))}
                assert not masked_equivalence(typing, keep, rewrite(typing, wrong)).equal
                break


def test_fewer_indices_than_planned_are_caught() -> None:
    typing, keep, _ = pruned()
    for atom, kept in keep.items():
        assert not masked_equivalence(typing, keep, rewrite(typing, {**keep, atom: kept[1:]})).equal


# -- precision ---------------------------------------------------------------------------------------------------------


def _settings(monkeypatch: pytest.MonkeyPatch, single: float, double: float) -> tuple[Difference, list[bool]]:
    asked = []

    def measured(*_: object, double: bool) -> Difference:
        asked.append(double)
        return Difference(exact if double else rough, 0, F64 if double else F32)

    rough, exact = single, double
    monkeypatch.setattr(verify, "_masked_difference", measured)
    typing, keep, graph = pruned()
    return masked_equivalence(typing, keep, graph), asked


@pytest.mark.parametrize(
    ("single", "double", "equal", "asked"),
    [
        (1e-7, 1.0, True, [False]),
        (5e-5, 1e-12, True, [False, True]),
        (5e-5, 1e-8, False, [False, True]),
        (float("inf"), 1e-12, True, [False, True]),
    ],
)
def test_double_decides_what_single_leaves_open(
    monkeypatch: pytest.MonkeyPatch, single: float, double: float, equal: bool, asked: list[bool]
) -> None:
    found, order = _settings(monkeypatch, single, double)
    assert (found.equal, order) == (equal, asked)


def test_rounding_alone_is_decided_in_double() -> None:
    class Cancelling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e4) - 1e4

    class Reordered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 2e4) - 2e4

    x = torch.rand(3, 4)
    before, after = capture(Cancelling(), (x,)), capture(Reordered(), (x,))
    found = equivalence(before, after)
    assert (found.equal, found.precision) == (True, F64)
    assert not equivalence(before, after, double=False).equal


def test_types_written_into_the_graph_become_double() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            half = x.to(torch.float16) * torch.ones(4, dtype=torch.bfloat16)
            return half.float(), torch.zeros(2, dtype=torch.float32), torch.arange(3), torch.rand(2) * 0

    x = torch.full((2, 4), 1 / 3)
    third, *rest = evaluate(capture(Casting(), (x,)), (x,), {}, double=True)
    assert torch.equal(third, x.double())
    assert [t.dtype for t in rest] == [F64, torch.int64, F64]


# -- the measure -------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "found", "relative"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.1, -4.0], 0.1 / 4),
        ([0.0, 0.0], [0.0, 0.25], 0.25),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([INF, 2.0], [INF, 2.5], 0.25),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([-INF, 2.0], [-1e30, 2.0], INF),
    ],
)
def test_the_distance_of_numbers(expected: list[float], found: list[float], relative: float) -> None:
    a, b = torch.tensor(expected), torch.tensor(found)
    assert difference(a, b, double=False).relative == pytest.approx(relative, rel=1e-6)


def test_the_distance_of_other_values() -> None:
    whole = torch.arange(10**6)
    one = whole.clone()
    one[7] += 1
    assert difference(whole, whole.clone(), double=False).equal
    assert not difference(whole, one, double=False).equal
    assert not difference(whole > 3, one > 7, double=True).equal
    wave = torch.polar(torch.ones(3), torch.arange(3.0))
    assert difference(wave, wave.conj().resolve_conj().conj(), double=False).equal
    assert not difference(wave, wave.conj(), double=False).equal
    assert difference(torch.zeros(0, 3), torch.zeros(0, 3), double=False).relative == 0
    assert difference(torch.zeros(3), torch.zeros(1, 3), double=False).relative == INF
    assert difference(torch.zeros(3), 0.0, double=False).relative == INF
    assert difference((1, None), (1, None), double=False).relative == 0
    assert difference((1, 2), (1, 3), double=False).relative == INF
    assert difference([whole], [whole, whole], double=False).relative == INF


def test_the_worst_output_counts() -> None:
    zeros = torch.zeros(2)
    found = difference({"a": zeros, "b": [zeros, zeros]}, {"a": zeros, "b": [zeros + 1e-6, zeros + 2e-6]}, double=True)
    assert (found.output, found.equal) == (2, False)
    assert str(found) == "relative difference 2.0e-06 in output 2 (float64, allowed 1e-09)"
    assert difference(zeros, zeros + TOLERANCE[F32] / 2, double=False).equal


# -- evaluation --------------------------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Write into its input and into a buffer, as a cache or a running mean does."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4, dtype=F64))
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        x.mul_(2)
        return self.last(self.first(x + self.total))


@pytest.mark.parametrize("double", [False, True])
def test_evaluation_leaves_no_trace(double: bool) -> None:
    x = torch.ones(3, 4, dtype=F64)
    typing = infer(capture(Writing(), (x.clone(),)))
    (group,) = typing.groups
    keep = {group.atom: np.array([1, 2])}
    graph = rewrite(typing, keep)
    for _ in range(2):
        expected = masked_outputs(typing, keep, (x,), {}, double=double)
        assert difference(expected, evaluate(graph, (x,), {}, double=double), double=True).equal
    assert torch.equal(x, torch.ones(3, 4, dtype=F64))
    assert not typing.graph.tensor("total").any()


def test_what_is_normalised_over_is_measured_on_kept_indices() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))

    module = Normed().double()
    nn.init.normal_(module.norm.weight)
    x = torch.randn(5, 3, dtype=F64)
    typing = infer(capture(module, (x,)))
    (group,) = typing.groups
    assert group.normalised == ("layer_norm",)
    kept = [0, 3, 4]
    found = masked_outputs(typing, {group.atom: np.array(kept)}, (x,), {}, double=True)
    y = functional.layer_norm(
        module.first(x)[:, kept], (3,), module.norm.weight[kept], module.norm.bias[kept], module.norm.eps
    )
    expected = functional.linear(y, module.last.weight[:, kept], module.last.bias)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)


def test_a_graph_is_evaluated_once_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(nn.Linear(3, 2), torch.randn(4, 3))
    args, kwargs = graph.example_inputs
    runs: list[Graph] = []
    outputs = verify._Evaluator.outputs

    def counted(self: Any, *given: Any) -> Any:
        runs.append(self.traced)
        return outputs(self, *given)

    monkeypatch.setattr(verify._Evaluator, "outputs", counted)
    with verify.remembering(most=2):
        first = evaluate(graph, args, kwargs)
        assert evaluate(graph, args, kwargs) is first
        assert len(runs) == 1
        evaluate(graph, args, kwargs, double=True)
        evaluate(graph.clone(), args, kwargs)
        evaluate(graph, args, kwargs, double=True)
        assert len(runs) == 3
        assert evaluate(graph, args, {}) is not first
        evaluate(graph, (torch.ones(4, 3),), kwargs)
        assert len(runs) == 5
        assert torch.equal(evaluate(graph, args, kwargs)[0], first[0])
        assert len(runs) == 6
    evaluate(graph, args, kwargs)
    evaluate(graph, args, kwargs)
    assert len(runs) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_product_that_was_rounded_as_it_was_stored_is_equal_and_a_wrong_one_is_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = capture(nn.Sequential(nn.Linear(6, 40, bias=False)).to(dtype), (torch.randn(3, 6, dtype=dtype),))
    (name,) = before.tensors()

    def difference_with(factor: float) -> Difference:
        after = before.clone()
        after.set_tensor(name, nn.Parameter(before.tensor(name).detach() * factor))
        return equivalence(before, after, double=True)

    unit = torch.finfo(dtype).eps
    assert difference_with(1 + unit).equal
    assert not difference_with(1 + 200 * unit).equal
    assert equivalence(before, before.clone(), double=True).allowed == 1e-9

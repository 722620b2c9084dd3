"""Mixtures of experts: whole experts and their width are groups, however routing is written; and when they are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import OPERATORS, contraction, infer
from graphopt.errors import PassError
from graphopt.rewrite import rewrite
from graphopt.verify import masked_equivalence
from tests.dialects.checks import EXACT, check, prepared, reasons, text, typed

aten = torch.ops.aten


class Mixture(nn.Module):
    """A layer between two others whose rows choose ``k`` of several experts; how, subclasses say."""

    def __init__(self, experts: int = 6, k: int = 2, width: int = 5, hidden: int = 7) -> None:
        super().__init__()
        self.experts, self.k = experts, k
        self.inp, self.router, self.out = nn.Linear(4, width), nn.Linear(width, experts), nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(experts, width, hidden))
        self.bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        result: Tensor = self.out(self.mixed(x, self.router(x)))
        return result

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def without(self, keep: Indices) -> Mixture:
        """Build the same layer with some experts alone, by hand."""
        twin = type(self)(len(keep), self.k).double().eval()
        rows = torch.from_numpy(keep)
        state = {
            name: tensor[rows] if name.partition(".")[0] in ("router", "up", "bias", "down") else tensor
            for name, tensor in self.state_dict().items()
        }
        twin.load_state_dict(state)
        return twin


class Scattered(Mixture):
    """All experts on all rows, weighted by gates that are zero but for those chosen."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        chances = scores.softmax(-1)
        values, chosen = chances.topk(self.k, dim=-1)
        gates = torch.zeros_like(chances).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        hidden = F.gelu(torch.einsum("td,edf->tef", x, self.up) + self.bias)
        return torch.einsum("te,ted->td", gates, torch.einsum("tef,efd->ted", hidden, self.down))


class OneHot(Mixture):
    """The same with one-hot rows and batched products; scores are normalised over those chosen."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        values, chosen = scores.topk(self.k, dim=-1)
        gates = (F.one_hot(chosen, self.experts) * values.softmax(-1).unsqueeze(-1)).sum(1)
        hidden = F.silu(torch.bmm(x.unsqueeze(0).expand(self.experts, -1, -1), self.up) + self.bias.unsqueeze(1))
        return (gates.t().unsqueeze(-1) * torch.bmm(hidden, self.down)).sum(0)


class Looked(Mixture):
    """The experts' weights are looked up for every row."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        values, chosen = scores.softmax(-1).topk(self.k, dim=-1)
        hidden = F.relu(torch.einsum("td,tkdf->tkf", x, self.up[chosen]) + self.bias[chosen])
        return (torch.einsum("tkf,tkfd->tkd", hidden, self.down[chosen]) * values.unsqueeze(-1)).sum(1)


class Switch(Mixture):
    """One expert a row, with its chance."""

    def __init__(self, experts: int = 6, k: int = 1) -> None:
        super().__init__(experts, k)

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        chances = scores.softmax(-1)
        chosen = chances.argmax(-1)
        hidden = F.relu(torch.einsum("td,tdf->tf", x, self.up[chosen]) + self.bias.index_select(0, chosen))
        found = torch.einsum("tf,tfd->td", hidden, self.down[chosen])
        return found * chances.gather(-1, chosen.unsqueeze(-1))


class Grouped(Mixture):
    """Rows are sorted by expert, counted, and multiplied group by group."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        values, chosen = scores.sigmoid().topk(self.k, dim=-1)
        ordered, order = chosen.reshape(-1).sort()
        counts = torch.histc(ordered.float(), bins=self.experts, min=0, max=self.experts - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // self.k]
        hidden = F.silu(multiplied(rows, self.up, offsets) + self.bias[ordered])
        found = multiplied(hidden, self.down, offsets) * values.reshape(-1)[order].unsqueeze(-1)
        return found[order.argsort()].view(-1, self.k, found.shape[-1]).sum(1)


@torch.library.custom_op("graphopt_tests::grouped_mm", mutates_args=())
def multiplied(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each run of rows with its own matrix, as fused kernels for experts do."""
    starts = [0, *offsets.tolist()]
    return torch.cat([rows[a:b] @ weight[i] for i, (a, b) in enumerate(pairwise(starts))])


@multiplied.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[-1])


ROWS = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WRITTEN: list[Callable[[], Mixture]] = [Scattered, OneHot, Looked, Switch]


def twin(module: nn.Module, keep: Indices) -> Mixture:
    assert isinstance(module, Mixture)
    return module.without(keep)


def experts_of(typing: Typing) -> Group:
    (group,) = (g for g in typing.groups if g.role == "experts")
    return group


@pytest.mark.parametrize("make", WRITTEN)
def test_experts_go_whole_and_lose_width(make: Callable[[], Mixture]) -> None:
    typing = check(make(), (ROWS,), [(OTHERS,)]).typing
    group = experts_of(typing)
    assert {str(p) for p in group.places} == {"router.weight[0]", "router.bias[0]", "up[0]", "bias[0]", "down[0]"}
    assert group.least == make().k
    assert {"up[2]", "bias[1]", "down[1]"} in [{str(p) for p in g.places} for g in typing.groups]


def test_the_groups_of_a_routed_layer() -> None:
    expected = """\
a: 6 experts, normalised over by softmax, topk: up[0] bias[0] down[0] router.weight[0] router.bias[0]
b: 5 channels: up[1] inp.weight[0] inp.bias[0] router.weight[1]
c: 7 channels: up[2] bias[1] down[1]
d: 5 channels: down[2] out.weight[1]"""
    assert text(typed(Scattered(), ROWS)) == expected


@pytest.mark.parametrize("make", WRITTEN)
@pytest.mark.parametrize("keep", [[0, 3], [1, 2, 5], [0, 1, 2, 3, 4]])
def test_the_result_is_the_layer_with_experts_deleted_by_hand(make: Callable[[], Mixture], keep: list[int]) -> None:
    module = prepared(make())
    typing = infer(capture(module, (ROWS,)))
    kept = np.array(keep, dtype=np.int64)
    pruned = rewrite(typing, {experts_of(typing).atom: kept})
    with torch.no_grad():
        for rows in (ROWS, OTHERS):
            assert torch.allclose(pruned.run(rows), twin(module, kept)(rows), rtol=0, atol=1e-12)


@given(data=st.data(), experts=st.integers(3, 9), k=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_any_experts_may_go_while_enough_stay(data: st.DataObject, experts: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = prepared(data.draw(st.sampled_from([Scattered, OneHot, Looked]))(experts, k), seed)
    typing = infer(capture(module, (ROWS,)))
    if k == experts:
        return
    kept = data.draw(st.sets(st.integers(0, experts - 1), min_size=k, max_size=experts - 1))
    keep = {experts_of(typing).atom: np.array(sorted(kept), dtype=np.int64)}
    assert masked_equivalence(typing, keep, rewrite(typing, keep)).relative <= EXACT


def test_sorted_and_counted_rows_are_exact() -> None:
    """As large language models route on one device: sort, count, cumulate, multiply by group."""
    operator = contraction._GROUPED
    module = prepared(Grouped())
    typing = infer(capture(module, (ROWS,)), {torch.ops.graphopt_tests.grouped_mm.default: operator})
    group = experts_of(typing)
    assert group.size == 6
    for seed, count in enumerate((2, 3, 5)):
        kept = np.sort(np.random.default_rng(seed).permutation(6)[:count])
        keep: dict[Atom, Indices] = {group.atom: kept}
        pruned = rewrite(typing, keep)
        assert masked_equivalence(typing, keep, pruned).relative <= EXACT
        with torch.no_grad():
            assert torch.allclose(pruned.run(OTHERS), twin(module, kept)(OTHERS), rtol=0, atol=1e-12)


def test_as_many_experts_as_are_chosen_must_stay() -> None:
    typing = typed(Scattered(), ROWS)
    group = experts_of(typing)
    with pytest.raises(PassError, match=r"must hold 2 indices at least, since an operator takes so many"):
        rewrite(typing, {group.atom: np.array([3])})
    result = graphopt.optimize(
        typing.graph,
        pipeline="prune-channels{budget.params=0.35 constraints.min_keep=0 constraints.normalised=together}",
    )
    (site,) = (s for s in result.report.passes[0].sites if s.facts["role"] == "experts")
    assert site.facts["kept"] >= 2


class Returned(Scattered):
    """The chosen experts are told to the caller, who counts them as they were."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.inp(x)
        scores = self.router(x)
        return self.out(self.mixed(x, scores)), scores.topk(self.k, dim=-1).indices


class Compared(Mixture):
    """A loop over experts by number."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        values, chosen = scores.softmax(-1).topk(self.k, dim=-1)
        found = torch.zeros_like(x)
        for number in range(self.experts):
            weight = (values * (chosen == number)).sum(-1, keepdim=True)
            found = found + weight * (F.relu(x @ self.up[number] + self.bias[number]) @ self.down[number])
        return found


class Shifted(Looked):
    """Another expert than the chosen one: arithmetic on positions."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        values, chosen = scores.topk(1, dim=-1)
        hidden = torch.einsum("td,tkdf->tkf", x, self.up[(chosen + 1) % self.experts])
        return (torch.einsum("tkf,tkfd->tkd", hidden, self.down[chosen]) * values.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Returned, "its positions are the model's output"),
        (Compared, "aten.eq.Scalar uses positions of it"),
        (Shifted, "aten.add.Tensor uses positions of it"),
    ],
)
def test_positions_that_are_used_in_another_way_keep_experts_whole(make: Callable[[], Mixture], why: str) -> None:
    typing = check(make(), (ROWS,), [(OTHERS,)]).typing
    assert reasons(typing, "router.weight", 0) == {why}
    assert not [g for g in typing.groups if g.role == "experts"]
    assert any("up[2]" in {str(p) for p in g.places} for g in typing.groups) or make is Shifted


class Separate(nn.Module):
    """Experts that are modules of their own, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            found = found + (values * (chosen == number)).sum(-1, keepdim=True) * expert(x)
        return found


def test_experts_that_are_modules_lose_width_alone() -> None:
    typing = check(Separate(), (ROWS,), [(OTHERS,)]).typing
    assert [g.name for g in typing.groups] == [f"experts.{number}.0.weight[0]" for number in range(3)]
    assert reasons(typing, "router.weight", 0) == {"aten.eq.Scalar uses positions of it"}


class InTeams(Looked):
    """Rows choose teams of experts first, then among the experts of these."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        teams = scores.view(-1, 3, self.experts // 3)
        best = teams.topk(1, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        allowed = torch.zeros_like(teams[..., 0]).scatter(1, best, 1.0).unsqueeze(-1).expand_as(teams)
        return super().mixed(x, scores.masked_fill(allowed.reshape(scores.shape) == 0, -1e9))


def test_whole_teams_of_experts_go() -> None:
    typing = check(InTeams(9), (ROWS,), [(OTHERS,)]).typing
    group = experts_of(typing)
    assert (group.size, group.least) == (3, 2)
    assert {"up[0]", "down[0]", "router.weight[0]"} <= {str(place) for place in group.places}


def test_largest_entries_without_their_positions_stay_whole() -> None:
    class Strongest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x).topk(3, dim=-1).values)
            return result

    assert reasons(typed(Strongest(), ROWS), "a.weight", 0) == {"its largest entries are taken"}


@pytest.mark.parametrize("target", [aten.one_hot.default, aten.index.Tensor, aten.scatter.src])
def test_wrong_positions_are_noticed(target: Any) -> None:
    """Positions of other rows give another result than the masked model: the comparison sees routing."""
    make: Any = {aten.one_hot.default: OneHot, aten.index.Tensor: Looked, aten.scatter.src: Scattered}[target]
    module = prepared(make())
    typing = infer(capture(module, (ROWS,)))
    keep = {experts_of(typing).atom: np.array([1, 2, 4])}
    pruned = rewrite(typing, keep)
    (node, *_) = (n for n in pruned.nodes if n.target is target)
    with pruned.module.graph.inserting_before(node):
        held = next(n for n in node.all_input_nodes if n.meta["spec"].dtype is torch.int64)
        wrong = pruned.module.graph.call_function(aten.flip.default, (held, [0]))
    wrong.meta = dict(held.meta)
    node.replace_input_with(held, wrong)
    pruned.module.recompile()
    assert masked_equivalence(typing, keep, pruned).relative > 1e-3


def test_counts_that_keep_their_bins_are_noticed() -> None:
    """Without its resizer, one_hot spreads over the experts from before, and the result does not run."""
    module = prepared(OneHot())
    entry = dataclasses.replace(OPERATORS[aten.one_hot.default], resize=None)
    typing = infer(capture(module, (ROWS,)), {aten.one_hot.default: entry})
    keep = {experts_of(typing).atom: np.array([1, 2, 4])}
    with pytest.raises(RuntimeError):
        rewrite(typing, keep).run(ROWS)

"""Rewriting: sliced tensors, and the arguments that hold sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.axes.algebra import Atom, leaves
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PassError
from graphopt.graph import Call
from graphopt.rewrite import rewrite
from tests.dialects.checks import check, reasons, typed


class BatchedHeads(nn.Module):
    """Fold heads into the batch, as attention by bmm does, and take slices that take everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, _ = x.shape
        heads = self.first(x).view(batch, places, 4, 3).transpose(1, 2).reshape(batch * 4, places, 3)
        heads = torch.relu(heads)[:, :, :][0 : batch * 4]
        both = torch.cat([heads, heads.flip(1)])
        heads = both[: batch * 4] + both[-batch * 4 :]
        return self.last(heads.view(batch, 4, places, 3).transpose(1, 2).reshape(batch, places, 12))


def test_a_dynamic_dimension_that_holds_a_group() -> None:
    x = torch.randn(2, 5, 6).double()
    found = check(BatchedHeads(), [x], [[x.repeat(3, 1, 1)], [x[:1]]])
    assert sorted(g.size for g in found.typing.groups) == [3, 4]


class HalvedBatch(nn.Module):
    """Cut a batch in which heads are folded in the middle of a row of heads, for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        heads = self.first(x).view(batch * 4, 3)
        heads = torch.cat([heads[: batch * 2].relu(), heads[batch * 2 :]])
        return self.last(heads.view(batch, 12))


def test_a_cut_inside_a_dynamic_dimension_freezes_it() -> None:
    x = torch.randn(2, 6).double()
    found = check(HalvedBatch(), [x], [[x.repeat(3, 1)], [x[:1]]])
    assert [g.size for g in found.typing.groups] == [3]
    assert "a dynamic dimension is cut" in reasons(found.typing, "first.weight", 0)


class Prompt(nn.Module):
    """Put learned rows before rows of any number, and cut them off again, counted from either end."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.mix, self.last = nn.Parameter(torch.ones(8, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.cat([self.rows, x])
        y = self.mix(y).view(y.shape[0], 2, 3).flatten(1)
        rows, given = y.split([8, x.shape[0]])
        return self.last(y[8:]), y[:8].sum(0), y[: -x.shape[0]].sum(0), self.last(given), rows.sum(0)


def test_a_concatenation_of_a_group_and_a_dynamic_dimension() -> None:
    x = torch.randn(5, 6).double()
    found = check(Prompt(), [x], [[torch.randn(40, 6).double()], [x[:3]]])
    assert [(g.name, g.size) for g in found.typing.groups] == [("rows[0]", 8)]


class Guided(nn.Module):
    """Cut a batch in which heads are folded into two equal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        heads = torch.cat([self.first(x), self.first(-x)]).view(batch * 2 * 4, 3)
        first, second = heads.chunk(2)
        third, fourth = heads.split(batch * 4)
        return self.last((first * second + third - fourth).view(batch, 4, 3).sum(1))


def test_equal_parts_of_a_dynamic_dimension() -> None:
    x = torch.randn(3, 6).double()
    found = check(Guided(), [x], [[x.repeat(4, 1)]])
    assert sorted(g.size for g in found.typing.groups) == [3, 4]


# -- keep sets ---------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Two linear layers around a hidden width of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (
            [],
            r"keep set of first.weight\[0\] must be sorted, .* not empty and within 0..7; it starts \[\] and has 0",
        ),
        ([3, 1], r"must be sorted, unique, .* it starts \[3, 1\] and has 2 entries"),
        ([1, 1, 2], "must be sorted, unique"),
        ([-1, 2], "within 0..7"),
        ([2, 8], "within 0..7"),
        ([True, False] * 4, r"found bool entries of shape \(8,\): of a mask pass numpy.flatnonzero"),
        ([0.0, 2.5], r"found float64 entries of shape \(2,\)"),
        (4, r"found int64 entries of shape \(\).* of a number of indices which"),
        ([[0, 1]], r"shape \(1, 2\)"),
    ],
)
def test_bad_keep_sets_are_refused(indices: Any, message: str) -> None:
    typing = typed(Perceptron(), torch.randn(2, 3).double())
    with pytest.raises(PassError, match=message):
        rewrite(typing, {typing.groups[0].atom: indices})


def test_only_free_groups_may_be_named() -> None:
    typing = typed(Perceptron(), torch.randn(2, 3).double())
    (frozen,) = leaves(typing.tensors["last.weight"][0])
    for atom in (frozen, Atom(8)):
        with pytest.raises(PassError, match="not a free group of this graph; keep sets may only name free groups"):
            rewrite(typing, {atom: np.arange(1)})


def test_keep_sets_are_read_from_lists_tensors_and_other_integers() -> None:
    typing = typed(Perceptron(), torch.randn(2, 3).double())
    atom, kept = typing.groups[0].atom, [1, 4, 6]
    expected = typing.graph.tensor("first.weight")[kept]
    for indices in (kept, np.array(kept, np.int32), np.array(kept, np.uint8), torch.tensor(kept)):
        assert torch.equal(rewrite(typing, {atom: indices}).tensor("first.weight"), expected)  # type: ignore[dict-item]


def test_keeping_everything_changes_nothing() -> None:
    typing = typed(Perceptron(), torch.randn(2, 3).double())
    for keep in ({}, {typing.groups[0].atom: np.arange(8)}):
        same = rewrite(typing, keep)
        assert same.text() == typing.graph.text()
        assert all(t is typing.graph.tensor(name) for name, t in same.tensors().items())


# -- tensors -----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Tie an embedding to the output, use a layer twice, freeze a parameter, hold a buffer and a table of bfloat16."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.twice.bias.requires_grad_(False)
        self.register_buffer("shift", torch.arange(8.0))
        self.table = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.twice(self.twice(self.embed(tokens)) + self.shift)
        return self.out(y * self.table)


def test_tensors_stay_what_they_are() -> None:
    module = Shared().eval()
    graph = capture(module, (torch.tensor([[1, 2], [3, 4]]),))
    before = {name: (t, t.clone()) for name, t in graph.tensors().items()}
    typing = infer(graph)
    (group,) = typing.groups
    pruned = rewrite(typing, {group.atom: np.array([0, 5, 6])})
    assert {name: tuple(t.shape) for name, t in pruned.tensors().items()} == {
        "out.weight": (11, 3),
        "twice.weight": (3, 3),
        "twice.bias": (3,),
        "shift": (3,),
        "table": (3,),
    }
    for name, new in pruned.tensors().items():
        old, copied = before[name]
        assert type(new) is type(old)
        assert (new.dtype, new.requires_grad, new.is_leaf) == (old.dtype, old.requires_grad, True)
        assert new.is_contiguous()
        assert graph.tensor(name) is old
        assert torch.equal(old, copied)
    assert pruned.aliases == {"embed.weight": "out.weight"}
    state = pruned.module.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert state["out.weight"].data_ptr() == state["embed.weight"].data_ptr()
    pruned.module.train()
    pruned.module(torch.tensor([[1, 2]])).sum().backward()
    assert {n for n, p in pruned.module.named_parameters() if p.grad is not None} == {
        "embed.weight",
        "twice.weight",
        "table",
    }


# -- arguments that hold sizes -----------------------------------------------------------------------------------------


class Sized(nn.Module):
    """Run a function of parameters and input whose sizes are written into the graph."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.zeros(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def lines(function: Callable[[Tensor, Tensor], Tensor], *shape: int, keep: int = 2) -> list[str]:
    """Return the lines of the rewritten graph's text that differ, every group keeping its first indices; check it."""
    x = torch.randn(2, 3).double()
    module = Sized(function, *shape)
    typing = check(module, [x], [[x.repeat(3, 1)]]).typing
    pruned = rewrite(typing, {g.atom: np.arange(min(keep, g.size - 1)) for g in typing.groups})
    old = [line.partition(" = ")[2] for line in typing.graph.text().splitlines()]
    new = [line.partition(" = ")[2] for line in pruned.text().splitlines()]
    return [line for line in new if line not in old]


def test_sizes_are_rewritten_where_they_stand() -> None:
    expand = lines(lambda x, w: (w * x.new_ones(6)).expand(4, 6)[None, :, :].square().sum((1, 2)) * x[:, 0], 4, 6)
    assert expand == [
        "aten.new_ones.default(%x, [2], pin_memory=False)",
        "aten.expand.default(%mul, [2, 2])",
    ]
    views = lines(lambda x, w: (x @ w).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).square().sum(1), 3, 8)
    assert views == [
        "aten.reshape.default(%matmul, [-1, 1, 2])",
        "aten.reshape.default(%transpose, [-1, 2])",
    ]


def test_equal_parts_are_spelled_out() -> None:
    def packed(x: Tensor, w: Tensor) -> Tensor:
        first, second = (x @ w).chunk(2, -1)
        return first.sigmoid().sum(1) + second.square().sum(1)

    module = Sized(packed, 3, 8)
    x = torch.randn(2, 3).double()
    typing = check(module, [x]).typing
    first, second = typing.groups
    pruned = rewrite(typing, {first.atom: np.array([0, 2, 3]), second.atom: np.array([1])})
    assert "split_with_sizes.default(%matmul, [3, 1], 1)" in pruned.text()


def test_bounds_of_slices_follow() -> None:
    def sliced(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return torch.stack([part.square().sum(1) for part in (y[:, 2:], y[:, :2], y[:, -4:], y[:, 2:-4], y[:, :99])], 1)

    found = [line.partition(", ")[2] for line in lines(sliced, 3, 9, keep=1) if "slice" in line]
    assert found == ["1, 1, 9223372036854775807)", "1, 0, 1)", "1, -1, 9223372036854775807)", "1, 1, -1)"]


def test_a_stride_takes_whole_rows() -> None:
    (found,) = lines(lambda x, w: (x @ w)[:, 1::3].square().sum(1), 3, 12)
    assert found == "aten.slice.Tensor(%slice_1, 1, 1, 7, 3)"


def test_the_scale_of_attention_stays() -> None:
    def attend(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x[:, :, None] * w).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).square().sum((1, 2, 3))

    found = lines(attend, 3, 96)
    assert found == [
        "aten.unflatten.int(%mul, 2, [3, 2, 2])",
        f"aten.scaled_dot_product_attention.default(%getitem, %getitem_1, %getitem_2, scale={1 / 8**0.5})",
    ]


def test_the_groups_of_convolutions_and_norms_follow() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depth = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=12)
            self.norm, self.grouped = nn.GroupNorm(4, 24), nn.Conv2d(24, 8, 1, groups=4)
            self.up, self.last = nn.ConvTranspose2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.grouped(self.norm(self.depth(self.first(x))))))

    typing = check(Grouped(), [torch.randn(2, 3, 4, 4).double()]).typing
    groups = {g.size: g for g in typing.groups if any(p.tensor == "depth.weight" for p in g.places)}
    assert groups.keys() == {4, 3, 2}
    pruned = rewrite(typing, {groups[4].atom: np.array([0, 2]), groups[3].atom: np.array([1])})
    calls = [Call(node) for node in pruned.nodes if node.op == "call_function"]
    assert [c["groups"] for c in calls if c.has("groups")] == [1, 2, 2, 2, 1]
    assert [c["num_groups"] for c in calls if c.has("num_groups")] == [2]
    shapes = {n: tuple(t.shape) for n, t in pruned.tensors().items() if n.endswith("weight")}
    assert shapes["depth.weight"] == (4, 1, 3, 3)
    assert shapes["grouped.weight"] == (4, 2, 1, 1)


def test_single_positions_are_never_lost() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.neck, self.wide = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 6, 1)
            self.gain, self.last = nn.Parameter(torch.zeros(1, 1, 1)), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            neck = self.neck(self.first(x)) * self.gain
            wide = self.wide(neck) + neck
            return self.last(wide.flatten(2).sum(2))

    found = check(Narrow(), [torch.randn(1, 1, 3, 1).double()], [[torch.randn(2, 1, 3, 1).double()]])
    assert sorted(g.size for g in found.typing.groups) == [4, 6]

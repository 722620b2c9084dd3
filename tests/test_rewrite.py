"""Rewriting: sliced tensors, and the arguments that hold sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.dialects.checks import check, reasons


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

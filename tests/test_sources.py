"""Tensors that passes made: plans go on speaking of the input model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph, Source
from graphopt.plan import Plan
from graphopt.rewrite import rewrite


class Split(nn.Module):
    """Two projections of one input, each with a width of its own, as a pass would make them of one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 5)
        self.out, self.other = nn.Linear(6, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.out(self.first(x).relu()) + self.other(self.second(x).tanh())
        return total


PACKED = {"packed.weight": (12, 4), "packed.bias": (12,)}
"""The input model's tensors: rows 0 to 5 are the first projection's, 6 to 10 the second's, nobody reads row 11."""

PARTS = {"first": np.arange(6), "second": np.arange(6, 11)}


def split() -> Graph:
    graph = capture(Split().eval(), (torch.randn(2, 4),))
    for part, rows in PARTS.items():
        graph.sources[f"{part}.weight"] = {
            0: (Source("packed.weight", (12, 4), 0, rows), Source("scale", (12,), 0, rows)),
            1: (Source("packed.weight", (12, 4), 1, np.arange(4)),),
        }
        graph.sources[f"{part}.bias"] = {0: (Source("packed.bias", (12,), 0, rows),)}
    return graph


def kept(typing: Typing, seed: int) -> dict[Atom, Indices]:
    rng = np.random.default_rng(seed)
    return {
        g.atom: np.sort(rng.choice(g.size, rng.integers(1, g.size + 1), replace=False)).astype(np.int64)
        for g in typing.groups
    }


def state(graph: Graph) -> dict[str, Tensor]:
    """Return the input model's state dict, of which the graph's tensors are parts."""
    tensors = {"packed.weight": torch.randn(PACKED["packed.weight"]), "packed.bias": torch.randn(12)}
    for part, rows in PARTS.items():
        tensors["packed.weight"][rows] = graph.tensor(f"{part}.weight").detach()
        tensors["packed.bias"][rows] = graph.tensor(f"{part}.bias").detach()
    tensors["scale"] = torch.arange(12.0)
    return tensors | {n: graph.tensor(n).detach() for n in ("out.weight", "out.bias", "other.weight", "other.bias")}


@given(seed=st.integers(0, 2**32 - 1), times=st.integers(1, 3))
def test_a_plan_speaks_of_what_tensors_were_made_of(seed: int, times: int) -> None:
    graph, plan = split(), Plan()
    whole = state(graph)
    for turn in range(times):
        typing = infer(graph)
        keep = kept(typing, seed + turn)
        plan = plan.then(Plan.of(typing, keep))
        graph = rewrite(typing, keep)
    left = plan.apply(whole, strict=False)
    assert not any(name.startswith(("first", "second")) for name in plan.keep)
    for kind in ("weight", "bias"):
        parts = [graph.tensor(f"{part}.{kind}").detach() for part in PARTS]
        torch.testing.assert_close(left[f"packed.{kind}"][:-1], torch.cat(parts), rtol=0, atol=0)
    assert left["packed.weight"].shape[0] == left["packed.bias"].shape[0] == left["scale"].shape[0]
    torch.testing.assert_close(left["scale"][-1], torch.tensor(11.0))
    for name in ("out.weight", "other.weight"):
        torch.testing.assert_close(left[name], graph.tensor(name).detach(), rtol=0, atol=0)


def test_what_any_part_keeps_is_kept() -> None:
    """Both parts stand for the same rows; only one of them is pruned."""
    graph = split()
    for kind in ("weight", "bias"):
        source = graph.sources[f"first.{kind}"][0][0]
        graph.sources[f"second.{kind}"] = {0: (source.at(np.arange(5)),)}
    typing = infer(graph)
    group = next(g for g in typing.groups if g.name == "first.weight[0]")
    plan = Plan.of(typing, {group.atom: np.array([0, 5])})
    assert plan.keep["scale"][0].tolist() == [0, 5, *range(6, 12)]
    assert "packed.weight" not in plan.keep
    group = next(g for g in typing.groups if g.name == "second.weight[0]")
    other = next(g for g in typing.groups if g.name == "first.weight[0]")
    plan = Plan.of(typing, {group.atom: np.array([1, 2]), other.atom: np.array([0, 2])})
    assert plan.keep["packed.weight"][0].tolist() == [0, 1, 2, *range(6, 12)]


def test_a_tensor_out_of_nothing_is_in_no_plan() -> None:
    graph = split()
    graph.sources["out.weight"] = {}
    typing = infer(graph)
    group = next(g for g in typing.groups if g.name == "first.weight[0]")
    plan = Plan.of(typing, {group.atom: np.arange(2)})
    assert set(plan.keep) == {"packed.weight", "packed.bias", "scale"}
    assert set(Plan.direct(typing, {group.atom: np.arange(2)}).keep) == {"first.weight", "first.bias", "out.weight"}


@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_stands_for_itself(dim: int) -> None:
    graph = split()
    (source,) = graph.stands_for("out.weight", dim)
    assert (source.tensor, source.shape, source.dim) == ("out.weight", (3, 6), dim)
    assert source.positions.tolist() == list(range((3, 6)[dim]))

"""Check that packed maps fall apart into maps that compute the same, and whose widths are free of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.allocation import Budget, Constraints
from graphopt.axes.groups import Group
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import PruneChannels, SplitParallel
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan
from graphopt.rewrite import rewrite
from graphopt.testing import Trial, try_pass
from graphopt.verify import masked_equivalence
from tests.small_models import attention, tokens

Forward = Callable[[Any, Tensor], Tensor]


class Packed(nn.Module):
    """A packed map of some features, taken apart as a function says."""

    def __init__(self, forward: Forward, features: int = 24, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.packed = nn.Linear(5, features)
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def packed(forward: Forward, features: int = 24, **parts: Any) -> Graph:
    torch.manual_seed(0)
    return capture(Packed(forward, features, **parts).eval(), torch.randn(2, 7, 5))


def gated(s: Any, x: Tensor) -> Tensor:
    gate, up = s.packed(x).chunk(2, -1)
    return torch.sigmoid(gate) * up


# -- text -------------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial = try_pass(SplitParallel(), packed(gated))
    assert trial.text().splitlines() == [
        "-%packed_weight: float32[24, 5] = @packed.weight",
        "-%packed_bias: float32[24] = @packed.bias",
        "-%linear: float32[2?, 7, 24] = aten.linear.default(%x, %packed_weight, %packed_bias)",
        "-%chunk: (float32[2?, 7, 12], float32[2?, 7, 12]) = aten.chunk.default(%linear, 2, -1)",
        "-%getitem: float32[2?, 7, 12] = getitem(%chunk, 0)",
        "-%getitem_1: float32[2?, 7, 12] = getitem(%chunk, 1)",
        "-%sigmoid: float32[2?, 7, 12] = aten.sigmoid.default(%getitem)",
        "-%mul: float32[2?, 7, 12] = aten.mul.Tensor(%sigmoid, %getitem_1)",
        "+%packed_weight_0: float32[12, 5] = @packed.weight_0",
        "+%packed_bias_0: float32[12] = @packed.bias_0",
        "+%linear_1: float32[2?, 7, 12] = aten.linear.default(%x, %packed_weight_0, %packed_bias_0)",
        "+%packed_weight_1: float32[12, 5] = @packed.weight_1",
        "+%packed_bias_1: float32[12] = @packed.bias_1",
        "+%linear_2: float32[2?, 7, 12] = aten.linear.default(%x, %packed_weight_1, %packed_bias_1)",
        "+%sigmoid: float32[2?, 7, 12] = aten.sigmoid.default(%linear_1)",
        "+%mul: float32[2?, 7, 12] = aten.mul.Tensor(%sigmoid, %linear_2)",
    ]
    (site,) = trial.applied
    assert (site.name, site.reason) == ("linear", "split 24 features into 12, 12")
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_the_views_of_a_part_have_no_dimension_for_the_parts() -> None:
    trial = try_pass(SplitParallel(), attention(), tokens())
    added = [line.partition(" = ")[2] for line in trial.text().splitlines() if line.startswith("+")]
    assert [line for line in added if line.startswith(("aten.reshape", "aten.permute"))] == [
        *(f"aten.reshape.default(%linear_{i}, [%sym_size_int_1, 7, 4, 6])" for i in (6, 7, 8)),
        *(f"aten.permute.default(%reshape_{i}, [0, 2, 1, 3])" for i in (2, 3, 4)),
    ]
    assert trial.difference() < 1e-9


def test_refusals_have_reasons() -> None:
    def several(s: Any, x: Tensor) -> Tensor:
        y = s.packed(x)
        a, b = y.chunk(2, -1)
        return a * b + y.sum()

    def twice(s: Any, x: Tensor) -> Tensor:
        y = s.packed(x)
        return y[..., :13] * y[..., 11:]

    def tokens_apart(s: Any, x: Tensor) -> Tensor:
        return s.packed(x)[:, 0] * s.packed(x)[:, 1]

    def one(s: Any, x: Tensor) -> Tensor:
        return s.packed(x)[..., 3:9]

    def shared(s: Any, x: Tensor) -> Tensor:
        return gated(s, x) + gated(s, x.sigmoid())

    def computed(s: Any, x: Tensor) -> Tensor:
        a, b = nn.functional.linear(x, s.packed.weight * 2, s.packed.bias).chunk(2, -1)
        return a * b

    found = {
        function.__name__: [site.reason for site in try_pass(SplitParallel(), packed(function)).skipped]
        for function in (several, twice, tokens_apart, one, shared, computed)
    }
    reason = "linear is cut along a dimension that is not its features alone"
    assert found == {
        "several": ["linear is also read whole: by sum_1"],
        "twice": ["slice_1 and slice_2 overlap"],
        "tokens_apart": [reason, reason.replace("linear", "linear_1")],
        "one": ["only one part of it is taken (slice_1)"],
        "shared": ["packed.weight is shared: linear, linear_1 read it"] * 2,
        "computed": ["mul is computed, not a tensor of the model"],
    }


# -- meaning ----------------------------------------------------------------------------------------------------------


def unbound(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.packed(x).reshape(x.shape[0], 7, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return (q.tanh() + k) * v


def unbound_in_front(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.packed(x).view(x.shape[0], 7, 3, 2, 4).permute(2, 0, 1, 3, 4).contiguous().view(3, x.shape[0], 7, 8)
    return (q.tanh() + k) * v


def selected(s: Any, x: Tensor) -> Tensor:
    y = s.packed(x).reshape(x.shape[0], 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return (y[0].tanh() + y[1]) * y[-1]


def within_heads(s: Any, x: Tensor) -> Tensor:
    q, v = s.packed(x).reshape(x.shape[0], 7, 2, -1).transpose(1, 2).split([5, 7], -1)
    return (q.sigmoid() @ q.transpose(-1, -2)) @ v


def heads_first(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.packed(x).view(x.shape[0], 7, 2, 3, 4).unbind(3)
    return (q.tanh() + k) * v


def sizes(s: Any, x: Tensor) -> Tensor:
    a, b, c = s.packed(x).split([4, 4, 16], dim=-1)
    return torch.cat([a.sigmoid() * b, c], -1)


def slices(s: Any, x: Tensor) -> Tensor:
    y = s.packed(x)
    return torch.cat([y[..., 18:].tanh() * y[..., 3:9].exp(), y[..., -15:-9]], -1)


def last_place(s: Any, x: Tensor) -> Tensor:
    a, b = s.packed(x).transpose(1, 2).chunk(2, 1)
    return a.sigmoid() * b


def written_into(s: Any, x: Tensor) -> Tensor:
    y = s.packed(x)
    return y[..., :12].sigmoid_().mul_(y[..., 12:])


def joined_biases(s: Any, x: Tensor) -> Tensor:
    bias = torch.cat([s.first, torch.zeros(8), s.third])
    y = nn.functional.linear(x, s.packed.weight, bias)
    q, k, v = y.reshape(x.shape[0], 7, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return (q.tanh() + k) * v


WAYS = [unbound, unbound_in_front, selected, within_heads, heads_first, sizes, slices, last_place, written_into, gated]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_any_way_of_taking_apart(way: Forward) -> None:
    trial = try_pass(SplitParallel(), packed(way))
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged
    assert trial.cost.macs <= trial.context.original.macs
    other = torch.randn(3, 7, 5)
    torch.testing.assert_close(trial.after.run(other), trial.before.run(other))


def test_biases_that_are_joined_are_taken_as_they_are() -> None:
    biases: dict[str, Any] = {"first": nn.Parameter(torch.randn(8)), "third": nn.Parameter(torch.randn(8))}
    trial = try_pass(SplitParallel(), packed(joined_biases, **biases))
    assert trial.applied
    assert {"first", "third"} < trial.after.tensors().keys()
    assert "aten.cat" not in trial.after.text()
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int) -> None:
    convolution = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1]

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(3, 10, 3, padding=1, stride=2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv(x).chunk(2, 1)
            return a.sigmoid() * b

    trial = try_pass(SplitParallel(), Halves().eval(), torch.randn(2, 3, *[7] * rank))
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_groups_of_a_convolution_are_left_alone() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 10, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv(x).chunk(2, 1)
            return a.sigmoid() * b

    trial = try_pass(SplitParallel(), Grouped().eval(), torch.randn(2, 4, 9))
    assert [site.reason for site in trial.skipped] == ["its 2 groups tie rows to parts of the input"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_training_stay(dtype: torch.dtype) -> None:
    model = Packed(gated).to(dtype).eval()
    model.packed.weight.requires_grad_(False)
    trial = try_pass(SplitParallel(), model, torch.randn(2, 7, 5, dtype=dtype))
    assert trial.difference() < 1e-9
    parts = trial.after.tensors()
    assert all(isinstance(part, nn.Parameter) and part.dtype is dtype for part in parts.values())
    assert {name: part.requires_grad for name, part in parts.items()} == {
        "packed.weight_0": False,
        "packed.bias_0": True,
        "packed.weight_1": False,
        "packed.bias_1": True,
    }


# -- what it is for ---------------------------------------------------------------------------------------------------


def places(groups: list[Group]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset((place.tensor, place.dim) for place in group.places) for group in groups}


def test_widths_become_free_of_each_other() -> None:
    trial = try_pass(SplitParallel(), attention(), tokens())
    before, after = ({g.role: g for g in infer(graph).groups} for graph in (trial.before, trial.after))
    assert "v dim" not in before
    assert "qk dim" not in before
    assert before["head dim"].size == after["qk dim"].size == after["v dim"].size == 6
    of_v = {place.tensor for place in after["v dim"].places}
    of_qk = {place.tensor for place in after["qk dim"].places}
    assert of_v == {"qkv.weight_2", "qkv.bias_2", "out.weight"}
    assert of_qk == {"qkv.weight_0", "qkv.bias_0", "qkv.weight_1", "qkv.bias_1"}


def test_v_alone_is_pruned_exactly_and_the_plan_speaks_of_the_packed_weight() -> None:
    trial = try_pass(SplitParallel(), attention(), tokens())
    typing = infer(trial.after)
    (width,) = [group for group in typing.groups if group.role == "v dim"]
    kept = np.array([1, 2, 5])
    after = rewrite(typing, {width.atom: kept})
    assert masked_equivalence(typing, {width.atom: kept}, after).equal
    assert [tuple(after.tensor(f"qkv.weight_{i}").shape) for i in range(3)] == [(24, 24), (24, 24), (12, 24)]
    plan = Plan.of(typing, {width.atom: kept})
    rows = [*range(48), *(48 + 6 * head + place for head in range(4) for place in kept)]
    assert plan.keep["qkv.weight"][0].tolist() == plan.keep["qkv.bias"][0].tolist() == rows
    assert plan.keep["out.weight"][1].tolist() == [row - 48 for row in rows[48:]]
    assert plan.keep.keys() == {"qkv.weight", "qkv.bias", "out.weight"}
    state = plan.apply(attention().state_dict())
    assert state["qkv.weight"].shape == (60, 24)


def test_a_pipeline_prunes_what_it_split() -> None:
    pipeline = Pipeline([SplitParallel(), PruneChannels(constraints=Constraints(normalised="never"))])
    result = graphopt.optimize(attention(), (tokens(),), pipeline=pipeline, budget=Budget(flops=0.6))
    assert "qkv.weight" in result.plan.keep
    assert not any("qkv.weight_" in name for name in result.plan.keep)


# -- properties -------------------------------------------------------------------------------------------------------


def numbered(x: Tensor) -> Tensor:
    """Return a sum over all but the batch in which every place has another weight."""
    return (x * torch.arange(1.0, 1 + x[0].numel()).view(x.shape[1:])).flatten(1).sum(1)


@st.composite
def ways(draw: st.DrawFn) -> tuple[Forward, int]:
    """Draw how many features there are, how they are viewed, and how the view is cut."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(factors))))
    dim = draw(st.integers(0, len(factors) - 1))
    cut = draw(st.sampled_from(["unbind", "chunk", "split", "slices"]))
    where = draw(st.integers(1, max(1, factors[order[dim]] - 1)))

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.packed(x).reshape(x.shape[0], 7, *factors).permute(0, *(2 + d for d in order), 1)
        if cut == "unbind":
            parts = y.unbind(1 + dim)
        elif cut == "chunk":
            parts = y.chunk(2, 1 + dim)
        elif cut == "split":
            parts = y.split(where, 1 + dim)
        else:
            parts = (y.narrow(1 + dim, 0, where), y.narrow(1 + dim, where, y.shape[1 + dim] - where))
        return torch.stack([numbered(part.sigmoid()) * (i + 1) for i, part in enumerate(parts)])

    return forward, int(np.prod(factors))


@settings(max_examples=25)
@given(ways())
def test_random_views_and_cuts(way: tuple[Forward, int]) -> None:
    trial: Trial = try_pass(SplitParallel(), packed(*way))
    assert trial.difference() < 1e-9
    assert trial.again().unchanged
    infer(trial.after)
    if trial.applied:
        assert not any(line.startswith("%unbind") for line in trial.after.text().splitlines())

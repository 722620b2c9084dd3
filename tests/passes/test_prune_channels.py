"""Check the pruning pass: its text, its meaning, its properties, and what it says of every group."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.allocation import Budget, Constraints, GlobalThreshold, Knapsack, Uniform
from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects.aten import infer
from graphopt.errors import BudgetError, PipelineError
from graphopt.graph import Graph
from graphopt.importance import L1, L2, GroupTaylor, Random
from graphopt.passes import PruneChannels
from graphopt.testing import Trial, try_pass
from tests.small_models import attention, convolutions, images, tokens

HALF = Budget(flops=0.5)


class Tiny(nn.Module):
    """Two linear layers; the four hidden channels have known norms, channel 1 the smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.second = nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[4.0, 0], [1, 0], [3, 0], [2, 0]]))
            self.first.bias.zero_()
            self.second.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def tiny() -> Graph:
    return capture(Tiny(), torch.randn(3, 2))


def kept(trial: Trial) -> dict[str, list[int]]:
    """Return the kept indices by the group's name."""
    removal = trial.result.removal
    if removal is None:
        return {}
    names = {group.atom: group.name for group in removal.typing.groups}
    return {names[atom]: indices.tolist() for atom, indices in removal.keep.items()}


# -- text -----------------------------------------------------------------------------------------------------------


def test_text(tiny: Graph) -> None:
    trial = try_pass(PruneChannels(budget=HALF), tiny)
    assert trial.text().splitlines() == [
        "-%first_weight: float32[4, 2] = @first.weight",
        "-%first_bias: float32[4] = @first.bias",
        "-%second_weight: float32[2, 4] = @second.weight",
        "+%first_weight: float32[2, 2] = @first.weight",
        "+%first_bias: float32[2] = @first.bias",
        "+%second_weight: float32[2, 2] = @second.weight",
        "-%linear: float32[3?, 4] = aten.linear.default(%x, %first_weight, %first_bias)",
        "-%relu: float32[3?, 4] = aten.relu.default(%linear)",
        "+%linear: float32[3?, 2] = aten.linear.default(%x, %first_weight, %first_bias)",
        "+%relu: float32[3?, 2] = aten.relu.default(%linear)",
    ]
    (site,) = trial.applied
    assert (site.name, site.reason) == ("first.weight[0]", "kept 2 of 4 indices")
    assert site.facts == {
        "role": "channels",
        "size": 4,
        "kept": 2,
        "places": ["first.weight[0]", "first.bias[0]", "second.weight[1]"],
        "normalised": [],
        "params": 20,
        "flops": 96,
    }
    assert kept(trial) == {"first.weight[0]": [0, 2]}
    assert trial.after.tensor("first.weight")[:, 0].tolist() == [4.0, 3.0]


def reasons(budget: Budget, **constraints: Any) -> dict[str, str]:
    """Return why groups of a transformer block were left alone."""
    trial = try_pass(PruneChannels(budget=budget, constraints=Constraints(**constraints)), attention(), tokens())
    return {site.name: site.reason for site in trial.skipped}


def test_refusals_have_reasons() -> None:
    over = "2 operators normalise over it (layer_norm, layer_norm_1)"
    found = reasons(Budget(flops=0.9), exclude=("up.weight[0]",))
    assert found["embed.weight[0]"] == f"{over}, and the budget was met without it (normalised=after)"
    assert found["up.weight[0]"] == (
        "all 40 indices must stay: excluded, or the bounds allow no less (min_keep 0.1, multiples of 1)"
    )
    found = reasons(Budget(flops=0.9), normalised="never")
    assert found["embed.weight[0]"] == f"{over}, and such groups stay whole (normalised=never)"


def test_every_group_is_accounted_for() -> None:
    trial = try_pass(PruneChannels(budget=HALF), attention(), tokens())
    names = [group.name for group in infer(trial.before).groups]
    assert [site.name for site in trial.context.sites] == names
    for site in trial.context.sites:
        assert site.applied == (site.facts["kept"] < site.facts["size"])


# -- meaning --------------------------------------------------------------------------------------------------------

MODELS = {"convolutions": (convolutions, images), "attention": (attention, tokens)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalised", ["after", "together", "never"])
def test_the_result_is_the_masked_model(name: str, normalised: Any) -> None:
    model, inputs = MODELS[name]
    each = PruneChannels(budget=HALF, constraints=Constraints(normalised=normalised))
    trial = try_pass(each, model(), inputs())
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "budget",
    [Budget(flops=0.3), Budget(params=0.4), Budget(memory=0.7), Budget(flops=0.6, params=0.4), Budget(params=1500)],
    ids=str,
)
def test_the_budget_is_met(name: str, budget: Budget) -> None:
    model, inputs = MODELS[name]
    trial = try_pass(PruneChannels(budget=budget), model(), inputs())
    before, after = trial.context.original, trial.cost
    limits = budget.limits({"flops": before.flops, "params": before.params, "memory": before.memory})
    for dimension, limit in limits.items():
        assert getattr(after, dimension) <= limit
    assert any(getattr(after, dimension) > 0.85 * limit for dimension, limit in limits.items())


def test_a_budget_that_cannot_be_met_says_what_can(tiny: Graph) -> None:
    with pytest.raises(BudgetError) as raised:
        try_pass(PruneChannels(budget=Budget(flops=0.01)), tiny)
    assert raised.value.smallest == {"flops": 0.25}
    assert "flops=0.25" in str(raised.value)


def test_a_budget_is_needed(tiny: Graph) -> None:
    with pytest.raises(PipelineError, match=r"prune-channels has no budget: give one to the pass, .* or to the call"):
        try_pass(PruneChannels(), tiny)


def test_one_budget_is_enough(tiny: Graph) -> None:
    with pytest.raises(PipelineError, match=r"has a budget of its own .* leave one of them out"):
        try_pass(PruneChannels(budget=HALF), tiny, budget=HALF)
    assert kept(try_pass(PruneChannels(), tiny, budget=HALF)) == {"first.weight[0]": [0, 2]}


# -- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_once_is_enough(name: str) -> None:
    model, inputs = MODELS[name]
    trial = try_pass(PruneChannels(budget=HALF), model(), inputs())
    again = trial.again()
    assert again.unchanged
    assert again.result.removal is None
    assert not again.applied


def test_a_budget_of_everything_changes_nothing(tiny: Graph) -> None:
    trial = try_pass(PruneChannels(budget=Budget(flops=1.0)), tiny)
    assert trial.unchanged
    assert [site.reason for site in trial.skipped] == ["each of its 4 indices is worth more than the budget it takes"]


def test_the_graph_from_before_is_not_touched() -> None:
    graph = capture(convolutions(), images())
    text, weights = graph.text(), {name: tensor.clone() for name, tensor in graph.tensors().items()}
    try_pass(PruneChannels(budget=HALF), graph)
    assert graph.text() == text
    assert all(torch.equal(graph.tensor(name), weight) for name, weight in weights.items())


@pytest.mark.parametrize("seed", [0, 1])
def test_random_scores_follow_the_seed(seed: int) -> None:
    each = PruneChannels(importance=Random(), budget=HALF)
    trials = [try_pass(each, convolutions(), images(), seed=s) for s in (seed, seed, seed + 1)]
    first, same, other = map(kept, trials)
    assert first == same
    assert first != other


def test_scores_that_need_data_get_it() -> None:
    data = [(images(4), torch.tensor([0, 1, 2, 3]))]
    trial = try_pass(PruneChannels(importance=GroupTaylor(), budget=HALF), convolutions(), images(), calibration=data)
    assert trial.difference() < 1e-9


def test_the_target_and_the_caller_both_ask_for_multiples() -> None:
    each = PruneChannels(budget=Budget(flops=0.6), constraints=Constraints(channel_multiple=4))
    trial = try_pass(each, convolutions(), images(), channel_multiple=6)
    sizes = {site.facts["kept"] for site in trial.applied}
    assert sizes
    assert all(size % 12 == 0 for size in sizes)


class Generated(nn.Module):
    """A random chain of layers, some with shortcuts, some joined by concatenation, some gated."""

    def __init__(self, plan: list[tuple[int, str]]) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList()
        width = 4
        for size, kind in plan:
            self.layers.append(nn.Linear(width, width if kind in ("shortcut", "gate") else size))
            width = width + size if kind == "join" else width if kind in ("shortcut", "gate") else size
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, (_, kind) in zip(self.layers, self.plan, strict=True):
            y = torch.relu(layer(x))
            if kind == "shortcut":
                y = x + y
            elif kind == "gate":
                y = x * torch.sigmoid(y)
            elif kind == "join":
                y = torch.cat([x, y], dim=-1)
            x = y
        return self.head(x)


layers = st.tuples(st.integers(2, 9), st.sampled_from(["plain", "shortcut", "gate", "join"]))


@settings(max_examples=25)
@given(st.lists(layers, min_size=1, max_size=5), st.sampled_from([L1(), L2(), Random()]), st.integers(3, 9), st.data())
def test_removing_is_masking(plan: list[tuple[int, str]], importance: Any, tenths: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    graph = capture(Generated(plan), torch.randn(3, 4))
    costs = CostModel(infer(graph))
    least = costs.params(np.ones(len(costs.groups)))
    budget = Budget(params=max(least + 1, costs.params(costs.full) * tenths / 10))
    allocation: Any = data.draw(st.sampled_from([Uniform(), GlobalThreshold(), Knapsack()]))
    each = PruneChannels(importance, allocation, budget, Constraints(min_keep=0.0))
    trial = try_pass(each, graph)
    assert trial.difference() < 1e-9
    assert trial.cost.params <= budget.params  # type: ignore[operator]
    assert trial.again().unchanged


def test_options_are_what_the_text_says() -> None:
    assert [field.name for field in dataclasses.fields(PruneChannels)] == [
        "importance",
        "allocation",
        "budget",
        "constraints",
        "progress",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_steps_leave_equal_shares(name: str) -> None:
    model, inputs = MODELS[name]
    graph = capture(model(), inputs())
    costs = [CostModel(infer(graph)).cost().flops]
    for step in range(1, 4):
        trial = try_pass(PruneChannels(budget=Budget(flops=0.3), progress=step / 3), model(), inputs())
        costs.append(trial.cost.flops)
        limit = costs[0] * 0.3 ** (step / 3)
        assert 0.85 * limit < costs[-1] <= limit


@pytest.mark.parametrize("progress", [0.0, -0.5, 1.5, float("nan")])
def test_progress_lies_between_nothing_and_the_budget(progress: float) -> None:
    with pytest.raises(PipelineError, match="progress must be above 0 and at most 1"):
        PruneChannels(progress=progress)

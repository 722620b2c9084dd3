"""What every allocator promises, and what each of them chooses."""

from dataclasses import FrozenInstanceError

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from graphopt.allocation import ALLOCATORS, Allocator, Budget, Constraints, GlobalThreshold, Keep, Knapsack, Uniform
from graphopt.axes.algebra import Axis, Product, Reason, atom
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing
from graphopt.cost import CostModel
from graphopt.errors import BudgetError, PassError
from tests.allocation.random_problems import SmallProblem, kept_score, small_problems
from tests.cost.handmade import typing_of

allocators = pytest.mark.parametrize("allocator", [kind() for kind in ALLOCATORS.values()], ids=ALLOCATORS)
constraints = st.builds(
    Constraints,
    min_keep=st.sampled_from([0.0, 0.1, 0.4]),
    channel_multiple=st.sampled_from([1, 2, 3]),
)


def frozen(size: int) -> Axis:
    return atom(size, Reason("fixed", "test"))


def allocate(allocator: Allocator, problem: SmallProblem, bounds: Constraints) -> Keep:
    return allocator.allocate(problem.groups, problem.scores, problem.cost, problem.budget, bounds)


@allocators
def test_allocators_are_frozen_dataclasses_with_their_name(allocator: Allocator) -> None:
    assert isinstance(allocator, Allocator)
    assert type(allocator)() == allocator
    assert ALLOCATORS[allocator.name] is type(allocator)
    with pytest.raises(FrozenInstanceError):
        allocator.option = 1  # type: ignore[attr-defined]


@allocators
@given(problem=small_problems(), bounds=constraints)
def test_a_budget_is_met_and_not_undershot(allocator: Allocator, problem: SmallProblem, bounds: Constraints) -> None:
    allowed = problem.allowed(bounds)
    smallest = [sizes[0] for sizes in allowed]
    if not problem.fits(smallest):
        with pytest.raises(BudgetError, match="the budget cannot be met") as caught:
            allocate(allocator, problem, bounds)
        for name in problem.limits:
            quantity = getattr(problem.cost, name)
            expected = quantity(smallest) / quantity(problem.cost.full)
            assert caught.value.smallest[name] == pytest.approx(expected)
        return
    keep = allocate(allocator, problem, bounds)
    sizes = problem.cost.sizes(keep)
    assert problem.fits(sizes)
    for i, group in enumerate(problem.groups):
        assert sizes[i] in allowed[i]
        larger = [n for n in allowed[i] if n > sizes[i]]
        if larger:
            grown = sizes.copy()
            grown[i] = larger[0]
            assert not problem.fits(grown), f"{group.name} could keep {larger[0]}"


@allocators
@given(problem=small_problems(), bounds=constraints)
def test_the_highest_scores_of_each_group_stay(
    allocator: Allocator, problem: SmallProblem, bounds: Constraints
) -> None:
    assume(problem.fits([sizes[0] for sizes in problem.allowed(bounds)]))
    keep = allocate(allocator, problem, bounds)
    for group in problem.groups:
        kept = keep.get(group.atom, np.arange(group.size))
        assert kept.dtype == np.int64
        assert (np.diff(kept) > 0).all()
        scores = problem.scores[group.name]
        dropped = np.setdiff1d(np.arange(group.size), kept)
        if group.atom in keep:
            assert len(dropped)
            worst = scores[kept].min()
            assert (scores[dropped] <= worst).all()
            # Of equal scores the first stay.
            assert (
                not (scores[dropped] == worst).any()
                or dropped[scores[dropped] == worst].min() > kept[scores[kept] == worst].max()
            )


@allocators
def test_nothing_is_dropped_where_the_model_fits(allocator: Allocator) -> None:
    typing, scores = hidden_layers([5, 9])
    assert allocator.allocate(typing.groups, scores, CostModel(typing), Budget(flops=1.0, params=1e12)) == {}


@given(problem=small_problems(linear=True, most_groups=5, most_indices=4))
def test_knapsack_is_within_five_percent_of_the_best_where_costs_are_linear(problem: SmallProblem) -> None:
    bounds = Constraints(min_keep=0)
    best = problem.best_score(bounds)
    assume(best is not None)
    assert best is not None
    assert kept_score(problem, allocate(Knapsack(), problem, bounds)) >= 0.95 * best


@given(problem=small_problems(), bounds=constraints)
def test_knapsack_is_close_to_the_best_where_costs_are_not_linear(problem: SmallProblem, bounds: Constraints) -> None:
    best = problem.best_score(bounds)
    assume(best is not None)
    assert best is not None
    assert kept_score(problem, allocate(Knapsack(), problem, bounds)) >= 0.85 * best


def hidden_layers(
    widths: list[int], price: int = 7, seed: int = 0
) -> tuple[Typing, dict[str, npt.NDArray[np.float64]]]:
    """Make groups whose indices all cost the same, with random scores."""
    shared = frozen(price)
    atoms = [atom(n) for n in widths]
    typing = typing_of(
        {f"w{i}.weight": (nn.Parameter(torch.empty(a.size, price)), (a, shared)) for i, a in enumerate(atoms)},
        [(a, shared) for a in atoms],
    )
    rng = np.random.default_rng(seed)
    return typing, {g.name: rng.random(g.size) for g in typing.groups}


@pytest.mark.parametrize("allocator", [Knapsack(), GlobalThreshold()], ids=["knapsack", "global-threshold"])
@given(widths=st.lists(st.integers(2, 60), min_size=1, max_size=6), data=st.data())
def test_equal_costs_and_one_budget_keep_the_top_k(
    allocator: Allocator, widths: list[int], data: st.DataObject
) -> None:
    typing, scores = hidden_layers(widths, seed=data.draw(st.integers(0, 100)))
    count = data.draw(st.integers(len(widths), sum(widths)))
    budget = Budget(**{data.draw(st.sampled_from(["flops", "params"])): min(1.0, (count + 0.5) / sum(widths))})
    keep = allocator.allocate(typing.groups, scores, CostModel(typing), budget, Constraints(min_keep=0))
    # Each group keeps its first index in any case; the best of the others fill up.
    owned = [(s, g.name) for g in typing.groups for s in np.sort(scores[g.name])[:-1]]
    top = sorted(owned, reverse=True)[: count - len(widths)]
    expected = {g.name: 1 + sum(name == g.name for _, name in top) for g in typing.groups}
    assert {g.name: len(keep.get(g.atom, range(g.size))) for g in typing.groups} == expected


@given(problem=small_problems(most_groups=3, most_indices=30, budgets=("flops",), least_share=0.3))
def test_uniform_keeps_about_the_same_share_of_every_group(problem: SmallProblem) -> None:
    bounds = Constraints(min_keep=0)
    assume(problem.fits([1] * len(problem.groups)))
    sizes = problem.cost.sizes(allocate(Uniform(), problem, bounds))
    at_shares = [np.maximum(1, np.floor(share * problem.cost.full + 0.5)) for share in np.arange(0, 1.001, 0.01)]
    wanted = max((sizes for sizes in at_shares if problem.fits(sizes)), key=lambda sizes: float(sizes.sum()))
    # Only the use of what is left may lift a group above its share.
    assert (sizes >= wanted).all()


def test_global_threshold_spares_a_layer_whose_scores_are_all_low() -> None:
    typing, _ = hidden_layers([100, 100, 100])
    rng = np.random.default_rng(0)
    scores = {g.name: abs(rng.normal(size=100)) * scale for g, scale in zip(typing.groups, (1, 0.01, 0.5), strict=True)}
    keep = GlobalThreshold().allocate(
        typing.groups, scores, CostModel(typing), Budget(params=0.3), Constraints(min_keep=0.05)
    )
    counts = [len(keep[g.atom]) for g in typing.groups]
    assert counts[1] == 5
    assert sum(counts) == 90


def square() -> tuple[Typing, Group, Group]:
    """Make two layers after one another, so that their widths multiply."""
    a, b = atom(20), atom(20)
    typing = typing_of({"w.weight": (nn.Parameter(torch.empty(20, 20)), (a, b))}, [(a, b)])
    first, second = typing.groups
    return typing, first, second


def test_knapsack_takes_from_where_the_least_is_lost() -> None:
    typing, first, second = square()
    scores = {first.name: np.ones(20), second.name: np.full(20, 100.0)}
    keep = Knapsack().allocate(typing.groups, scores, CostModel(typing), Budget(flops=0.5))
    assert {g: len(k) for g, k in keep.items()} == {first.atom: 10}


def test_knapsack_takes_from_the_dearest_of_equal_scores() -> None:
    cheap, dear = atom(20), atom(20)
    typing = typing_of(
        {n: (nn.Parameter(torch.empty(20)), (a,)) for n, a in (("cheap.weight", cheap), ("dear.weight", dear))},
        [(cheap, frozen(10)), (dear, frozen(1000))],
    )
    scores = {g.name: np.ones(20) for g in typing.groups}
    keep = Knapsack().allocate(typing.groups, scores, CostModel(typing), Budget(flops=2 * (20 * 10 + 10 * 1000)))
    assert {g: len(k) for g, k in keep.items()} == {dear: 10}


def test_negative_scores_do_not_drop_more_than_the_budget_asks() -> None:
    typing, scores = hidden_layers([20, 20])
    shifted = {name: values - 0.5 for name, values in scores.items()}
    cost, budget = CostModel(typing), Budget(flops=0.5)
    for allocator in (Knapsack(), GlobalThreshold()):
        found = allocator.allocate(typing.groups, shifted, cost, budget)
        assert cost.sizes(found).sum() == 20
        expected = allocator.allocate(typing.groups, scores, cost, budget)
        assert all((found[a] == expected[a]).all() for a in expected)


def test_heads_go_as_wholes_and_dimensions_stay_multiples() -> None:
    heads, dim, width = atom(8), atom(32), frozen(64)
    typing = typing_of(
        {
            "q.weight": (nn.Parameter(torch.empty(256, 64)), (Product((heads, dim)), width)),
            "o.weight": (nn.Parameter(torch.empty(64, 256)), (width, Product((heads, dim)))),
        },
        [(heads, dim, width), (heads, dim, width)],
    )
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) for g in typing.groups}
    for allocator in (Knapsack(), GlobalThreshold(), Uniform()):
        cost = CostModel(typing)
        sizes = cost.sizes(
            allocator.allocate(typing.groups, scores, cost, Budget(flops=0.4), Constraints(channel_multiple=8))
        )
        assert sizes[1] % 8 == 0
        assert sizes[0] * sizes[1] % 8 == 0
        assert 0.4 * 256 - 32 < sizes[0] * sizes[1] <= 0.4 * 256


@allocators
def test_several_budgets_hold_at_once(allocator: Allocator) -> None:
    many, few = atom(50), atom(50)
    typing = typing_of(
        {
            "many.weight": (nn.Parameter(torch.empty(50, 100)), (many, frozen(100))),
            "few.weight": (nn.Parameter(torch.empty(50)), (few,)),
        },
        [(many, frozen(1)), (few, frozen(100))],
    )
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(50) for g in typing.groups}
    cost = CostModel(typing)
    sizes = cost.sizes(allocator.allocate(typing.groups, scores, cost, Budget(flops=0.6, params=0.3)))
    assert cost.flops(sizes) <= 0.6 * cost.flops(cost.full)
    assert cost.params(sizes) <= 0.3 * cost.params(cost.full)
    if allocator.name == "knapsack":
        # Each budget is met by the group that costs it, to the last index.
        assert sizes.tolist() == [14, 30]


def test_a_peak_of_several_equal_heights_comes_down_as_a_whole() -> None:
    atoms = [atom(40) for _ in range(6)]
    typing = typing_of(
        {f"w{i}.weight": (nn.Parameter(torch.empty(40)), (a,)) for i, a in enumerate(atoms)},
        results=[(a, frozen(1000)) for a in atoms],
    )
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(40) for g in typing.groups}
    cost = CostModel(typing)
    sizes = cost.sizes(Knapsack().allocate(typing.groups, scores, cost, Budget(memory=0.5)))
    pairs = sizes[:-1] + sizes[1:]
    # Each result is read by the next, so two that follow one another are live together.
    assert pairs.max() == 40
    assert cost.memory(sizes) <= 0.5 * cost.memory(cost.full)
    assert kept(scores, typing, sizes) >= 0.97 * kept(scores, typing, np.full(6, 20))


def kept(scores: dict[str, npt.NDArray[np.float64]], typing: Typing, sizes: npt.NDArray[np.int64]) -> float:
    return sum(float(np.sort(scores[g.name])[::-1][:n].sum()) for g, n in zip(typing.groups, sizes, strict=True))


# -- groups that are normalised over --


def normalised_model() -> tuple[Typing, dict[str, npt.NDArray[np.float64]]]:
    """Make a perceptron of width `hidden` on a normalised stream of width `stream`; its cost is their product."""
    stream, hidden = atom(40), atom(60)
    typing = typing_of(
        {
            "stream.weight": (nn.Parameter(torch.empty(40, 3)), (stream, frozen(3))),
            "up.weight": (nn.Parameter(torch.empty(60, 40)), (hidden, stream)),
        },
        [(hidden, stream)],
        normalised=[stream],
    )
    return typing, {g.name: np.arange(1.0, g.size + 1) for g in typing.groups}


@allocators
@pytest.mark.parametrize(
    ("order", "share", "stream_whole", "hidden_at_most"),
    [("after", 0.6, True, 36), ("after", 0.3, False, 30), ("never", 0.3, True, 18), ("together", 0.3, None, 60)],
)
def test_normalised_groups_follow_their_order(
    allocator: Allocator, order: str, share: float, stream_whole: bool | None, hidden_at_most: int
) -> None:
    typing, scores = normalised_model()
    cost = CostModel(typing)
    bounds = Constraints(normalised=order)  # type: ignore[arg-type]
    stream, hidden = cost.sizes(allocator.allocate(typing.groups, scores, cost, Budget(flops=share), bounds))
    assert stream * hidden <= share * 2400
    assert hidden <= hidden_at_most
    if stream_whole is not None:
        assert (stream == 40) == stream_whole


@allocators
def test_what_normalised_groups_lose_grows_from_nothing(allocator: Allocator) -> None:
    """Just beyond what the others can give, the normalised group loses little."""
    typing, scores = normalised_model()
    cost = CostModel(typing)
    stream, hidden = cost.sizes(allocator.allocate(typing.groups, scores, cost, Budget(flops=0.49)))
    assert hidden <= 30
    assert stream >= 38


@allocators
def test_a_model_of_normalised_groups_alone_is_pruned(allocator: Allocator) -> None:
    stream = atom(40)
    typing = typing_of(
        {"w.weight": (nn.Parameter(torch.empty(40, 3)), (stream, frozen(3)))}, [(stream,)], normalised=[stream]
    )
    cost = CostModel(typing)
    keep = allocator.allocate(typing.groups, {"w.weight[0]": np.arange(40.0)}, cost, Budget(flops=0.5))
    assert keep[typing.groups[0].atom].tolist() == list(range(20, 40))
    with pytest.raises(BudgetError, match=r"1 groups that are normalised over stay whole \(normalised='never'\)"):
        allocator.allocate(
            typing.groups,
            {"w.weight[0]": np.arange(40.0)},
            cost,
            Budget(flops=0.5),
            Constraints(normalised="never"),
        )


# -- what users meet --


@allocators
def test_an_infeasible_budget_says_what_is_reachable(allocator: Allocator) -> None:
    typing, scores = hidden_layers([20, 40])
    cost = CostModel(typing)
    with pytest.raises(BudgetError, match=r"flops=0.05 .*is the smallest reachable: flops=0.1\.") as caught:
        allocator.allocate(typing.groups, scores, cost, Budget(flops=0.05))
    assert caught.value.smallest == {"flops": pytest.approx(0.1)}
    reachable = allocator.allocate(typing.groups, scores, cost, Budget(flops=caught.value.smallest["flops"]))
    assert cost.sizes(reachable).tolist() == [2, 4]
    with pytest.raises(BudgetError, match=r"smallest reachable: params=42\.") as caught:
        allocator.allocate(typing.groups, scores, cost, Budget(params=30))
    assert caught.value.smallest == {"params": 42}


@allocators
def test_own_bounds_and_exclusions_hold(allocator: Allocator) -> None:
    typing, scores = hidden_layers([20, 40, 30])
    cost = CostModel(typing)
    bounds = Constraints(exclude=["w0"], bounds={"w1": (0.8, 1.0)})
    sizes = cost.sizes(allocator.allocate(typing.groups, scores, cost, Budget(flops=0.7), bounds))
    assert sizes[0] == 20
    assert sizes[1] >= 32
    assert sizes.sum() == 63


@allocators
def test_an_upper_bound_holds_where_the_budget_is_met_without(allocator: Allocator) -> None:
    typing, scores = hidden_layers([20, 40])
    cost = CostModel(typing)
    keep = allocator.allocate(typing.groups, scores, cost, Budget(flops=1.0), Constraints(bounds={"w1": (0.1, 0.25)}))
    assert cost.sizes(keep).tolist() == [20, 10]


@allocators
def test_only_the_given_groups_shrink(allocator: Allocator) -> None:
    typing, scores = hidden_layers([20, 40])
    cost = CostModel(typing)
    for bounds in (Constraints(), Constraints(exclude=["w0"])):
        keep = allocator.allocate(typing.groups[1:], scores, cost, Budget(flops=0.5), bounds)
        assert cost.sizes(keep).tolist() == [20, 10]


@allocators
def test_scores_that_are_missing_or_not_finite_are_refused(allocator: Allocator) -> None:
    typing, scores = hidden_layers([3, 4])
    cost, budget = CostModel(typing), Budget(flops=0.5)
    with pytest.raises(PassError, match=r"group w0.weight\[0\] needs 3 scores, one an index; the criterion gave none"):
        allocator.allocate(typing.groups, {"w1.weight[0]": np.ones(4)}, cost, budget)
    with pytest.raises(PassError, match=r"gave an array of shape \(4,\)"):
        allocator.allocate(typing.groups, {**scores, "w0.weight[0]": np.ones(4)}, cost, budget)
    with pytest.raises(PassError, match="scores that are not finite"):
        allocator.allocate(typing.groups, {**scores, "w0.weight[0]": np.array([1, np.nan, 2])}, cost, budget)


@allocators
def test_a_graph_without_groups_meets_what_it_meets(allocator: Allocator) -> None:
    typing = typing_of({"w.weight": (nn.Parameter(torch.empty(3)), (frozen(3),))}, [(frozen(3),)])
    cost = CostModel(typing)
    assert allocator.allocate([], {}, cost, Budget(flops=1.0)) == {}
    with pytest.raises(BudgetError, match="0 of 0 groups may shrink"):
        allocator.allocate([], {}, cost, Budget(flops=0.5))


@allocators
def test_the_result_is_the_same_every_time(allocator: Allocator) -> None:
    typing, scores = hidden_layers([30, 70, 20])
    cost = CostModel(typing)
    first, second = (allocator.allocate(typing.groups, scores, cost, Budget(flops=0.37)) for _ in range(2))
    assert all((first[a] == second[a]).all() for a in first)

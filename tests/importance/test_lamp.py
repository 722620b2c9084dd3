"""Relative distortion of single tensors against its definition and its invariances."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes.algebra import atom
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.importance import L2, LAMP, NORMALIZERS, ScoreContext
from tests.cost.handmade import typing_of
from tests.small_models import attention, tokens

Unit = Literal["weight", "channel"]
UNITS: tuple[Unit, Unit] = ("weight", "channel")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def typed(model: nn.Module) -> Typing:
    return infer(capture(model, (torch.randn(2, 4).to(next(model.parameters())),)))


PERCEPTRON = typed(Perceptron().double())


def by_definition(weight: Tensor) -> Tensor:
    """Square over the sum of all squares that are no smaller."""
    squares = weight.detach().double().square()
    left = torch.stack([squares[squares >= s].sum() for s in squares.flatten()]).reshape(squares.shape)
    return squares / left


def test_single_weights_are_scored_tensor_by_tensor_and_added_up() -> None:
    model = Perceptron()
    found = LAMP("weight", normalizer="none").score(ScoreContext(typed(model)))
    first, second, third = (by_definition(m.weight) for m in (model.first, model.second, model.third))
    assert found["first.weight[0]"] == pytest.approx(((first.sum(1) + second.sum(0)) / 2).numpy())
    assert found["second.weight[0]"] == pytest.approx(((second.sum(1) + third.sum(0)) / 2).numpy())


def test_channels_are_scored_tensor_by_tensor_and_averaged() -> None:
    model = Perceptron()
    found = LAMP("channel", normalizer="none").score(ScoreContext(typed(model)))
    up = NORMALIZERS["lamp"](model.first.weight.detach().double().square().sum(1).numpy())
    down = NORMALIZERS["lamp"](model.second.weight.detach().double().square().sum(0).numpy())
    assert found["first.weight[0]"] == pytest.approx((up + down) / 2)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.sampled_from(UNITS))
def test_rescaling_a_layer_changes_nothing(exponents: list[float], unit: Unit) -> None:
    graph = PERCEPTRON.graph.clone()
    before = LAMP(unit).score(ScoreContext(infer(graph)))
    for exponent, layer in zip(exponents, ("first", "second", "third"), strict=True):
        graph.set_tensor(f"{layer}.weight", nn.Parameter(graph.tensor(f"{layer}.weight").detach() * 10**exponent))
    after = LAMP(unit).score(ScoreContext(infer(graph)))
    for group, scores in before.items():
        assert after[group] == pytest.approx(scores, rel=1e-9)


def test_the_normaliser_of_that_name_is_decided_by_the_largest_layer() -> None:
    model = Perceptron()
    before = L2("lamp").score(ScoreContext(typed(model)))["first.weight[0]"]
    with torch.no_grad():
        model.second.weight.mul_(1000)
    after = L2("lamp").score(ScoreContext(typed(model)))["first.weight[0]"]
    assert after != pytest.approx(before, rel=1e-2)
    columns = NORMALIZERS["lamp"](model.second.weight.detach().double().square().sum(0).numpy())
    assert after == pytest.approx(columns, rel=1e-4)


@pytest.mark.parametrize("unit", UNITS)
@given(st.integers(0, 100))
def test_the_greatest_of_every_tensor_scores_exactly_one(unit: Unit, seed: int) -> None:
    weight = torch.randn(7, 1, 3, generator=torch.Generator().manual_seed(seed))
    if unit == "weight":
        # One weight an index: its score is that of the weight.
        weight = weight[:, :, :1]
    extents = atom(weight.shape[1]), atom(weight.shape[2])
    typing = typing_of({"w.weight": (nn.Parameter(weight), (atom(7), *extents))})
    scores = LAMP(unit, normalizer="none").score(ScoreContext(typing))["w.weight[0]"]
    assert scores.max() == 1
    assert scores.argmax() == weight.square().sum((1, 2)).argmax()


@pytest.mark.parametrize("unit", UNITS)
def test_ties_go_by_position(unit: Unit) -> None:
    typing = typing_of({"w.weight": (nn.Parameter(torch.full((4, 1), -2.0)), (atom(4), atom(1)))})
    scores = LAMP(unit, normalizer="none").score(ScoreContext(typing))["w.weight[0]"]
    assert scores == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_small_weights_add_up_in_double_precision(dtype: torch.dtype) -> None:
    # In float32 a running sum of 2^26 stops growing at steps of 1.
    weight = torch.ones(50_000, 1, dtype=dtype)
    weight[-1] = 2.0**13
    typing = typing_of({"w.weight": (nn.Parameter(weight), (atom(50_000), atom(1)))})
    scores = LAMP("channel", normalizer="none").score(ScoreContext(typing))["w.weight[0]"]
    assert scores[0] == pytest.approx(1 / (2.0**26 + 49_999), rel=1e-13)


def test_vectors_do_not_count_and_a_group_without_weights_says_so() -> None:
    a, b = atom(3), atom(2)
    tensors = {
        "w.weight": (nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]])), (a, atom(1))),
        "w.bias": (nn.Parameter(torch.tensor([100.0, 1.0, 1.0])), (a,)),
        "scale": (nn.Parameter(torch.tensor([1.0, 2.0])), (b,)),
    }
    context = ScoreContext(typing_of(tensors))
    found = LAMP(normalizer="none").score(context)
    assert found["w.weight[0]"] == pytest.approx([1 / 14, 4 / 13, 1])
    assert found["scale[0]"] / found["scale[0]"].sum() == pytest.approx([1 / 5, 4 / 5])
    assert context.notes == {"scale[0]": "scored by squared magnitude: it is in no weight"}


def test_ranks_within_a_role_share_the_cut_alike() -> None:
    typing = infer(capture(attention(), (tokens(),)))
    context = ScoreContext(typing)
    plain, ranked = LAMP("weight", normalizer="none").score(context), LAMP("weight", "role", "none").score(context)
    roles = {group.role for group in typing.groups}
    assert len(roles) > 2
    for role in roles:
        names = [group.name for group in typing.groups if group.role == role]
        before = np.concatenate([plain[name] for name in names])
        after = np.concatenate([ranked[name] for name in names])
        assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
        assert np.sort(after) == pytest.approx(np.arange(1, len(after) + 1) / len(after))

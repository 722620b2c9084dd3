"""Criteria against their definitions."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PassError, PipelineError
from graphopt.graph import Graph
from graphopt.importance import (
    CRITERIA,
    L1,
    L2,
    LAMP,
    BNGamma,
    Criterion,
    GroupTaylor,
    InputFluctuation,
    Random,
    ScoreContext,
    Scores,
)
from graphopt.passes.prune import PruneChannels
from graphopt.pipeline import Pipeline


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return result


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Perceptron(), (torch.randn(2, 4),))


@pytest.fixture
def typing(graph: Graph) -> Typing:
    return infer(graph)


def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(count)]


@pytest.mark.parametrize(("name", "kind"), CRITERIA.items())
def test_criteria_are_frozen_dataclasses_with_their_name(name: str, kind: type[Criterion]) -> None:
    typing = infer(
        capture(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Perceptron()).eval(), (torch.randn(2, 4),))
    )
    criterion = kind()
    assert isinstance(criterion, Criterion)
    assert kind.name == name
    assert len(fields(criterion)) <= 6  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        criterion.normalizer = "none"  # type: ignore[attr-defined]
    scores = criterion.score(ScoreContext(typing, labelled(1)))
    assert {name: len(values) for name, values in scores.items()} == {g.name: g.size for g in typing.groups}
    assert all(np.isfinite(values).all() and values.dtype == np.float64 for values in scores.values())


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        ("bn-gamma{over=sum}", BNGamma(over="sum")),
        ('lamp{unit=weight scope=role normalizer="none"}', LAMP("weight", "role", "none")),
        ("group-taylor{batches=4 component=nvit}", GroupTaylor(4, "nvit")),
        ("input-fluctuation{metric=wifn normalizer=zscore}", InputFluctuation("wifn", normalizer="zscore")),
    ],
)
def test_criteria_are_written_and_read_as_text_and_toml(text: str, criterion: Criterion) -> None:
    pipeline = Pipeline.parse(f"prune-channels{{importance={text}}}")
    assert pipeline == Pipeline([PruneChannels(importance=criterion)])
    assert str(pipeline) == f"prune-channels{{importance={text}}}"
    assert Pipeline.from_toml(pipeline.to_toml()) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lamp{unit=filter}", "'filter'"),
        ("input-fluctuation{metric=wif}", "did you mean"),
        ("group-taylor{component=nvit normalizer=mean}", "one would undo the other"),
    ],
)
def test_options_that_do_not_exist_are_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline.parse(f"prune-channels{{importance={text}}}")


def test_magnitudes_over_producer_bias_and_sink(typing: Typing) -> None:
    state = {name: t.detach().double() for name, t in typing.graph.tensors().items()}
    up, bias, down = state["first.weight"], state["first.bias"], state["second.weight"]
    l1 = up.abs().sum(1) + bias.abs() + down.abs().sum(0)
    l2 = (up**2).sum(1) + bias**2 + (down**2).sum(0)
    context = ScoreContext(typing)
    assert L1("none").score(context)["first.weight[0]"] == pytest.approx(l1.numpy(), rel=1e-6)
    assert L2("none").score(context)["first.weight[0]"] == pytest.approx(l2.numpy(), rel=1e-6)


def test_random_scores_depend_on_the_seed_and_the_group_alone(typing: Typing) -> None:
    context = ScoreContext(typing)
    first, again, other = Random(1).score(context), Random(1).score(context), Random(2).score(context)
    name = typing.groups[1].name
    assert (first[name] == again[name]).all()
    assert (first[name] != other[name]).any()
    typing.groups = typing.groups[1:]
    assert (Random(1, "none").score(ScoreContext(typing))[name] == Random(1, "none").score(context)[name]).all()


def taylor_by_definition(typing: Typing, module: nn.Module, batches: list[Any], loss: Any) -> Scores:
    totals: Scores = {}
    for inputs, labels in batches:
        module.zero_grad()
        loss(module(inputs), labels).backward()
        terms = {n: (p.detach() * p.grad).double() for n, p in module.named_parameters() if p.grad is not None}
        for up, down, group in (("first", "second", "first.weight[0]"), ("second", "third", "second.weight[0]")):
            slices = terms[f"{up}.weight"].sum(1) + terms[f"{up}.bias"] + terms[f"{down}.weight"].sum(0)
            totals[group] = totals.get(group, 0) + slices.numpy() ** 2 / len(batches)
    return totals


@pytest.mark.parametrize("loss", [None, lambda outputs, labels: mse_loss(outputs[:, 0], labels.float())])
def test_taylor_squares_the_sum_of_a_slice_and_averages_batches(loss: Any) -> None:
    module = Perceptron()
    typing = infer(capture(module, (torch.randn(2, 4),)))
    data = labelled(3)
    found = GroupTaylor(normalizer="none").score(ScoreContext(typing, data, loss))
    expected = taylor_by_definition(typing, module, data, loss or cross_entropy)
    for group, values in expected.items():
        assert found[group] == pytest.approx(values, rel=1e-4, abs=1e-12)


class Wide(nn.Module):
    """Linear in each parameter alone: what deleting an index changes is its first-order term exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Parameter(torch.eye(3, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.inner.detach()) * self.scale).sum(-1, keepdim=True)


def test_taylor_is_the_true_squared_change_of_a_linear_loss() -> None:
    inputs = torch.randn(2, 3)
    wide = Wide()
    typing = infer(capture(wide, (inputs,)))
    group = next(g for g in typing.groups if g.size == 5)
    found = GroupTaylor(normalizer="none").score(ScoreContext(typing, [(inputs, None)], lambda out, _: out.sum()))
    with torch.no_grad():
        whole = wide(inputs).sum()
        for index in range(5):
            masked = wide.scale.clone()
            masked[index] = 0
            change = whole - ((inputs @ wide.inner) * masked).sum()
            assert found[group.name][index] == pytest.approx(float(change) ** 2, rel=1e-4, abs=1e-10)


@pytest.fixture(scope="module")
def transformer() -> Typing:
    layers = nn.Sequential(Block(8), nn.Flatten(1), nn.Linear(24, 3))
    return infer(
        capture(nn.Sequential(nn.Linear(4, 8), *(Block(8) for _ in range(3)), layers), (torch.randn(2, 3, 4),))
    )


class Block(nn.Module):
    """One attention of two heads and one perceptron, each on a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.down(torch.tanh(self.up(x)))


def test_taylor_divides_by_what_the_kind_of_a_group_is_worth(transformer: Typing) -> None:
    context = ScoreContext(transformer, [(torch.randn(4, 3, 4), torch.randint(3, (4,)))])
    plain = GroupTaylor(normalizer="none").score(context)
    divided = GroupTaylor(component="nvit", normalizer="none").score(context)
    divisors: dict[str, set[int]] = {}
    for group in transformer.groups:
        kind = "embedding" if group.places[0].tensor == "0.weight" else group.role
        ratio = np.sqrt(plain[group.name] / divided[group.name])
        assert ratio == pytest.approx(np.full(group.size, round(ratio[0])))
        divisors.setdefault(kind, set()).add(round(ratio[0]))
    assert divisors == {"embedding": {4}, "heads": {6}, "qk dim": {2}, "v dim": {1}, "channels": {1}}


@pytest.mark.parametrize("normalizer", ["distortion", "mean", "lamp"])
def test_taylor_refuses_constants_that_would_cancel(normalizer: str) -> None:
    with pytest.raises(PipelineError, match=f"normalizer={normalizer} is relative to the group, so one would undo"):
        GroupTaylor(component="nvit", normalizer=normalizer)


def test_taylor_uses_as_many_batches_as_asked(typing: Typing) -> None:
    data = labelled(4)
    two = GroupTaylor(batches=2).score(ScoreContext(typing, iter(data)))
    first_two = GroupTaylor().score(ScoreContext(typing, data[:2]))
    assert all((two[g] == first_two[g]).all() for g in two)


def test_taylor_touches_neither_parameters_nor_gradients() -> None:
    module = Perceptron()
    for p in module.parameters():
        p.requires_grad_(False)
    before = {n: p.clone() for n, p in module.named_parameters()}
    graph = capture(module, (torch.randn(2, 4),))
    GroupTaylor().score(ScoreContext(infer(graph), labelled(1)))
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is None
    assert all(p.grad is None and not p.requires_grad for p in graph.module.parameters())


def never() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("calibration", "loss", "error", "message"),
    [
        (None, None, PipelineError, "group-taylor needs gradients: pass calibration="),
        (never(), None, PipelineError, "holds no batch"),
        ([torch.randn(2, 4)], None, PipelineError, "needs labels"),
        (["text"], None, PipelineError, "batch 0 of the calibration data is of type str"),
        ([torch.randn(2, 4)], lambda out, _: out, PipelineError, r"one element; found \[2, 3\] for batch 0"),
        ([torch.randn(2, 4)], lambda out, _: 1.0, PipelineError, "one element; found float"),
        ([torch.full((2, 4), torch.nan)], lambda out, _: out.sum(), PassError, "batch 0 is nan"),
    ],
)
def test_taylor_says_what_it_lacks(
    typing: Typing, calibration: Any, loss: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GroupTaylor().score(ScoreContext(typing, calibration, loss))

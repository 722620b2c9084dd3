"""Check that biases make up for the mean of what was removed: in closed form, for every kind of layer, in any graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PipelineError
from graphopt.graph import Graph
from graphopt.passes import CompensateMean, RidgeRefit
from graphopt.pipeline import Reference
from graphopt.sweep import Sweep
from graphopt.testing import Trial, damaged, pruned, try_pass
from graphopt.verify import difference, evaluate
from tests.passes.test_prune_channels import Generated, layers
from tests.small_models import attention, convolutions, images, tokens


def cut(graph: Graph, keep: Mapping[str, Any]) -> tuple[Graph, Reference]:
    """Keep only the named indices of the named groups."""
    typing = infer(graph)
    atoms = {str(place): g.atom for g in typing.groups for place in g.places}
    return pruned(typing, {atoms[name]: np.asarray(kept) for name, kept in keep.items()})


def halved(graph: Graph) -> tuple[Graph, Reference]:
    """Keep every other index of every group."""
    typing = infer(graph)
    return pruned(typing, {g.atom: np.arange(0, g.size, 2) for g in typing.groups if g.size > 1})


def compensated(
    model: nn.Module, inputs: Tensor, keep: Mapping[str, Any], *, propagate: bool = True, data: Any = None
) -> tuple[Trial, Reference]:
    graph, reference = cut(capture(model.double().eval(), inputs.double()), keep)
    data = [inputs.double()] if data is None else data
    return try_pass(CompensateMean(propagate=propagate), graph, calibration=data, reference=reference), reference


def gap(trial: Trial, reference: Reference, inputs: Tensor, after: Graph | None = None) -> float:
    """Return how far the result is from the whole model, relative."""
    expected = evaluate(reference.graph, (inputs,), {}, double=True)
    return difference(expected, evaluate(after or trial.after, (inputs,), {}, double=True), double=True).relative


class Tiny(nn.Module):
    """Two layers; the first two of four hidden channels are constant, and the second layer has no bias."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.second = nn.Linear(4, 3, bias=bias)
        with torch.no_grad():
            self.first.weight[:2] = 0
            self.first.bias[:2] = torch.tensor([2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial, _ = compensated(Tiny(), torch.randn(5, 2), {"first.weight[0]": [0, 2]})
    assert trial.text().splitlines() == [
        "-%linear_1: float64[5?, 3] = aten.linear.default(%relu, %second_weight)",
        "+%second_bias: float64[3] = @second.bias",
        "+%linear_1: float64[5?, 3] = aten.linear.default(%relu, %second_weight, bias=%second_bias)",
    ]
    (site,) = trial.applied
    assert site.name == "second.weight"
    assert site.reason == (
        f"error {site.facts['error_before']:.3g} -> {site.facts['error_after']:.3g} of the output's spread, "
        "over 5 samples"
    )
    (skipped,) = trial.skipped
    assert (skipped.name, skipped.reason) == ("first.weight", "the mean of its output is what it was (5 samples)")
    assert isinstance(trial.after.tensor("second.bias"), nn.Parameter)
    assert trial.after.sources == {"second.bias": {}}


class Twice(nn.Module):
    """Applies one layer to two inputs, and one without a bias to two others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(3, 4), nn.Linear(3, 4)
        self.down, self.plain = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)
        self.mix = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.up(x)), torch.relu(self.other(x))
        return self.down(a) + self.down(b) + self.plain(a) + self.plain(b) + torch.einsum("bi,ij->bj", a, self.mix)


def test_refusals_have_reasons() -> None:
    trial, _ = compensated(Twice(), torch.randn(5, 3), {"up.weight[0]": [0, 2]}, propagate=False)
    assert not trial.applied
    assert [(site.name, site.reason) for site in trial.skipped] == [
        ("mix", "einsum (aten.einsum.default) is an operator that this pass does not take apart"),
        (
            "down.weight in linear_2",
            "down.bias is shared, by linear_2, linear_3: a change for one would change the others",
        ),
        (
            "down.weight in linear_3",
            "down.bias is shared, by linear_2, linear_3: a change for one would change the others",
        ),
        *(
            (
                f"plain.weight in linear_{i}",
                "it has no bias, and plain.weight is shared with other layers: one bias could not serve all",
            )
            for i in (4, 5)
        ),
    ]
    assert trial.unchanged


# -- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("propagate", [False, True])
def test_constant_channels_are_replaced_exactly(propagate: bool, bias: bool) -> None:
    x = torch.randn(5, 2).double()
    trial, reference = compensated(Tiny(bias), x, {"first.weight[0]": [2, 3]}, propagate=propagate)
    other = torch.randn(7, 2).double()
    assert gap(trial, reference, other, trial.before) > 1e-2
    assert gap(trial, reference, other) < 1e-9
    for name in ("second.weight", "second.bias"):
        assert gap(trial, reference, other, damaged(trial.after, name)) > 1e-6


def test_the_error_of_one_column_is_its_variance_times_its_weights() -> None:
    """The identity of FLAP's score: what is left when input j goes is Var(x_j) times the sum of its squared weights."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double(), torch.randn(50, 6).double() + 2
    with torch.no_grad():
        hidden, weight = model[:2](x), model.get_parameter("2.weight")
        for j in (0, 4):
            trial, _ = compensated(model, x, {"0.weight[0]": np.setdiff1d(np.arange(9), j)}, propagate=False)
            left = (model(x) - trial.after.run(x)).square().sum(1).mean()
            score = hidden[:, j].var(unbiased=False) * weight[:, j].square().sum()
            torch.testing.assert_close(left, score, rtol=1e-10, atol=0)
            (site,) = trial.applied
            spread = model(x).var(0, unbiased=False).sum()
            assert site.facts["error_after"] == pytest.approx(float((score / spread).sqrt()), rel=1e-9)


class Layers(nn.Module):
    """Doubles channels in a way that makes half of them constant, and hands them to a layer."""

    def __init__(self, layer: nn.Module, extents: int, width: int = 4) -> None:
        super().__init__()
        convolution: Any = (nn.Conv1d, nn.Conv2d)[extents - 1]
        self.make: Any = convolution(2, width, 1)
        self.layer = layer
        with torch.no_grad():
            self.make.weight[1::2] = 0
            self.make.bias[1::2] = torch.arange(1.0, width / 2 + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.make(x))


class Turned(nn.Module):
    """A product with a parameter along the channels, as some language models write their layers."""

    def __init__(self, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.add = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3)), add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.bias, x.transpose(1, 2).reshape(-1, 4), self.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "convolution": (lambda: nn.Conv2d(4, 3, 3, stride=2, dilation=2), 2, "make.weight[0]"),
    "convolution without bias": (lambda: nn.Conv2d(4, 3, 2, bias=False), 2, "make.weight[0]"),
    "one dimension": (lambda: nn.Conv1d(4, 3, 3), 1, "make.weight[0]"),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2, "make.weight[0]"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 1), 2, "make.weight[0]"),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), 2, "make.weight[0]"),
    "addmm": (lambda: Turned(torch.addmm), 1, "make.weight[0]"),
    "matmul": (lambda: Turned(lambda b, x, w: x @ w), 1, "make.weight[0]"),
    "matmul and sum": (lambda: Turned(lambda b, x, w: x @ w + b), 1, "make.weight[0]"),
    "batch norm between": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2)),
        2,
        "make.weight[0]",
    ),
}


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str, propagate: bool) -> None:
    torch.manual_seed(5)
    make, extents, _ = LAYERS[name]
    model, x = Layers(make(), extents), torch.randn(3, 2, *[6, 7][:extents]).double()
    graph = capture(model.double().eval(), x)
    group = next(g for g in infer(graph).groups if str(g.places[0]).startswith("make.weight[0]"))
    kept = np.arange(0, group.size, 2) if group.size == 4 else np.array([0])
    trial, reference = compensated(model, x, {"make.weight[0]": kept}, propagate=propagate)
    assert len(trial.applied) == 1
    other = torch.randn(2, 2, *[6, 7][:extents]).double()
    assert gap(trial, reference, other, trial.before) > 1e-2
    assert gap(trial, reference, other) < 1e-9
    assert trial.again().unchanged


def test_zero_padding_is_approximate_and_says_so() -> None:
    torch.manual_seed(5)
    model, x = Layers(nn.Conv2d(4, 3, 3, padding=1), 2), torch.randn(3, 2, 6, 7).double()
    trial, reference = compensated(model, x, {"make.weight[0]": [0, 2]})
    (site,) = trial.applied
    assert site.reason.endswith("approximate where its window reaches into the zero padding")
    with torch.no_grad():
        missing = reference.graph.run(x) - trial.before.run(x)
        left = reference.graph.run(x) - trial.after.run(x)
    best = missing - missing.mean((0, 2, 3), keepdim=True)  # no constant leaves less
    torch.testing.assert_close(left, best)


class Mixer(nn.Module):
    """Mixes tokens, once for every channel; some channels are constant, and some of what is hidden in between."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.up, self.down, self.head = nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(4, 2)
        with torch.no_grad():
            for layer in (self.make, self.up):
                layer.weight[:2] = 0
            self.up.bias[:2] = torch.tensor([1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.head(x + self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2))


@pytest.mark.parametrize("each", [CompensateMean(), CompensateMean(propagate=False), RidgeRefit(ridge=0)])
def test_channels_are_gone_along_which_another_layer_is_applied(each: Any) -> None:
    torch.manual_seed(3)
    x, other = torch.randn(9, 5, 3).double(), torch.randn(4, 5, 3).double()
    graph = capture(Mixer().double(), x)
    small, reference = cut(graph, {"make.weight[0]": [1, 2, 3], "up.weight[0]": [2, 3, 4, 5]})
    trial = try_pass(each, small, calibration=[x], reference=reference)
    assert {site.name for site in trial.applied} >= {"down.weight"}
    assert [site.name for site in trial.applied if site.facts["samples"] == 9 * 3] == ["down.weight"]
    assert trial.again().unchanged
    # What is hidden is constant where it was removed, so all that is left of the tokens is mixed as before.
    mixed = [values_of(g, other, "linear_2") for g in (reference.graph, trial.after)]
    torch.testing.assert_close(mixed[0][:, 1:], mixed[1], rtol=1e-9, atol=1e-9)


def values_of(graph: Graph, x: Tensor, name: str) -> Tensor:
    """Return what a node yields."""
    sweep = Sweep(graph, [((x,), {})])
    (found,) = (sweep.results(node)[0] for node in sweep if node.name == name)
    return found


class Joined(nn.Module):
    """Several layers read one input, and one reads several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 5)
        self.left, self.right, self.both = nn.Linear(4, 2), nn.Linear(4, 2, bias=False), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.one(x)), torch.tanh(self.two(x))
        return torch.cat([self.left(a), self.right(a), self.both(torch.cat([b, a], 1))], 1)


@pytest.mark.parametrize("propagate", [False, True])
def test_several_consumers_and_joined_inputs(propagate: bool) -> None:
    model, x = Joined().double(), torch.randn(20, 3).double() + 1
    keep = {"one.weight[0]": [1, 2], "two.weight[0]": [0, 1, 4]}
    trial, _ = compensated(model, x, keep, propagate=propagate)
    assert {site.name for site in trial.applied} == {"left.weight", "right.weight", "both.weight"}
    with torch.no_grad():
        torch.testing.assert_close(trial.after.run(x).mean(0), model(x).mean(0), rtol=1e-9, atol=1e-9)
        removed = torch.relu(model.one(x))[:, [0, 3]].mean(0)
        expected = model.left.bias + model.left.weight[:, [0, 3]] @ removed
    torch.testing.assert_close(trial.after.tensor("left.bias"), expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(model.left.bias, expected)


# -- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(layers, min_size=1, max_size=4), st.booleans(), st.data())
def test_the_mean_of_the_output_is_that_of_the_whole_model(
    plan: list[tuple[int, str]], propagate: bool, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    model = Generated(plan).double()
    batches = [torch.randn(n, 4).double() + 1 for n in data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))]
    graph = capture(model, batches[0])
    typing = infer(graph)
    keep = {g.atom: np.arange(data.draw(st.integers(0, g.size - 1)), g.size) for g in typing.groups}
    small, reference = pruned(typing, keep)
    trial = try_pass(CompensateMean(propagate=propagate), small, calibration=batches, reference=reference)
    for site in trial.applied:
        assert site.facts["error_after"] <= site.facts["error_before"]
    assert trial.again().unchanged
    if propagate:
        x = torch.cat(batches)
        torch.testing.assert_close(trial.after.run(x).mean(0), graph.run(x).mean(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_whole_models(name: str) -> None:
    model, inputs = {"convolutions": (convolutions, images), "attention": (attention, tokens)}[name]
    graph, reference = halved(capture(model(), inputs()))
    before = {n: t.clone() for n, t in reference.graph.tensors().items()}
    data = [(inputs(4), torch.zeros(4)), (inputs(2), torch.zeros(2))]
    trial = try_pass(CompensateMean(), graph, calibration=data, reference=reference)
    assert trial.applied
    assert {n for n in trial.after.tensors() if n.endswith("weight")} == {n for n in before if n.endswith("weight")}
    assert all(torch.equal(reference.graph.tensor(n), t) for n, t in before.items())
    assert trial.again().unchanged
    assert infer(trial.after).groups  # the new biases are typed with the rest


def test_nothing_was_removed() -> None:
    trial = try_pass(CompensateMean(), Tiny(), torch.randn(2, 2), calibration=[torch.randn(2, 2)])
    assert trial.unchanged
    assert trial.context.notes == [
        "nothing was removed since the last lossless change, so there is nothing to compensate"
    ]
    assert not trial.context.sites


@pytest.mark.parametrize(("data", "what"), [(None, "was given"), ([], "holds no batch")])
def test_calibration_data_is_needed(data: Any, what: str) -> None:
    graph, reference = cut(capture(Tiny(), torch.randn(2, 2)), {"first.weight[0]": [0, 1]})
    with pytest.raises(
        PipelineError, match=rf"compensate-mean compares .* no calibration data {what}: pass calibration="
    ):
        try_pass(CompensateMean(), graph, calibration=data, reference=reference)


def test_in_a_pipeline() -> None:
    data = [images(4), images(3) + 1]
    result = graphopt.optimize(
        convolutions(),
        images(),
        budget=graphopt.Budget(flops=0.5),
        pipeline="prune-channels,compensate-mean{propagate=false}",
        calibration=data,
    )
    record = result.report.passes[1]
    assert record.changed
    assert record.preserves == "approximate"
    assert any(site.applied for site in record.sites)
    result.module.train()(images(4)).sum().backward()
    assert all(p.grad is not None for p in result.module.parameters())

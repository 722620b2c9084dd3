"""Check the refit against closed forms, where it must be exact, and that it never makes a layer worse."""

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
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PipelineError
from graphopt.passes import RidgeRefit
from graphopt.passes.recover.least_squares import solve
from graphopt.pipeline import Pipeline
from graphopt.testing import Trial, damaged, pruned, try_pass
from tests.passes.test_compensate_mean import Twice, cut, gap, halved
from tests.passes.test_prune_channels import Generated, layers
from tests.small_models import attention, convolutions, images, tokens

EXACT = RidgeRefit(ridge=1e-15, samples=0)


def refitted(each: RidgeRefit, model: nn.Module, x: Tensor, keep: dict[str, Any]) -> tuple[Trial, Any]:
    graph, reference = cut(capture(model.double().eval(), x.double()), keep)
    return try_pass(each, graph, calibration=[x.double()], reference=reference), reference


class Mixed(nn.Module):
    """A layer whose last two channels are linear combinations of the others, and one that reads it."""

    def __init__(self, layer: nn.Module, extents: int, groups: int = 1) -> None:
        super().__init__()
        kind: Any = (nn.Linear, nn.Conv1d, nn.Conv2d)[extents]
        options = {} if extents == 0 else {"kernel_size": 1}
        self.make: Any = kind(3, 6, **options).double()
        self.layer = layer
        with torch.no_grad():
            mix = torch.zeros(6, 6).double()
            half = 6 // groups
            for g in range(groups):  # the last third of a group follows from the rest of it
                rest = half - half // 3
                mix[g * half : g * half + rest, g * half : g * half + rest] = torch.eye(rest)
                mix[g * half + rest : (g + 1) * half, g * half : g * half + rest] = torch.randn(
                    half - rest, rest
                ).double()
            flat = self.make.weight.flatten(1)
            self.make.weight.copy_((mix @ flat).view_as(self.make.weight))
            self.make.bias.copy_(mix @ self.make.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.make(x))


class Turned(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.function = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bias, x, self.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "linear": (lambda: nn.Linear(6, 4), 0, 1),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), 0, 1),
    "addmm": (lambda: Turned(torch.addmm), 0, 1),
    "matmul": (lambda: Turned(lambda b, x, w: x @ w), 0, 1),
    "matmul and sum": (lambda: Turned(lambda b, x, w: x @ w + b), 0, 1),
    "one dimension": (lambda: nn.Conv1d(6, 4, 3, padding=1, bias=False), 1, 1),
    "padding": (lambda: nn.Conv2d(6, 4, 3, padding=2, stride=2, dilation=2), 2, 1),
    "same": (lambda: nn.Conv2d(6, 4, (3, 2), padding="same"), 2, 1),
    "groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), 2, 2),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), 2, 1),
    "transposed groups": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False), 2, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_follows_linearly_from_the_rest_is_made_up_for(name: str) -> None:
    torch.manual_seed(2)
    make, extents, groups = LAYERS[name]
    shape = (60, 3) if extents == 0 else (12, 3, *[6, 7][:extents])
    x, other = torch.randn(shape).double(), torch.randn(shape).double()
    kept = [0, 1, 2, 3] if groups == 1 else [0, 1]  # of a group's channels
    trial, reference = refitted(EXACT, Mixed(make(), extents, groups), x, {"make.weight[0]": kept})
    assert len(trial.applied) == 1
    assert gap(trial, reference, other, trial.before) > 1e-2
    assert gap(trial, reference, other) < 1e-8
    for parameter in trial.after.tensors():
        assert gap(trial, reference, other, damaged(trial.after, parameter)) > 1e-6
    assert trial.again().unchanged


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_linear_combinations_are_made_up_for_in_any_chain(seed: int, kept: int, more: int, bias: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, kept + more), nn.Linear(kept + more, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=False)
    ).double()
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        mix = torch.randn(more, kept).double()
        first.weight[kept:] = mix @ first.weight[:kept]
        first.bias[kept:] = mix @ first.bias[:kept]
    x = torch.randn(40, 4).double()
    trial, reference = refitted(EXACT, model, x, {"0.weight[0]": np.arange(kept)})
    assert gap(trial, reference, torch.randn(30, 4).double()) < 1e-8
    assert trial.again().unchanged


# -- the closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("towards", ["kept", "zero"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_of_the_augmented_least_squares(towards: Any, bias: bool) -> None:
    """Ridge regression is ordinary least squares with rows sqrt(λ) I that ask for the weights it shrinks to."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)).double()
    x, kept = torch.randn(30, 3).double() + 1, torch.tensor([1, 2, 5])
    each = RidgeRefit(ridge=0.3, towards=towards, bias=bias)
    trial, _ = refitted(each, model, x, {"0.weight[0]": kept.numpy()})
    with torch.no_grad():
        a, y = model[:2](x)[:, kept], model(x)
        target = model.get_parameter("2.weight")[:, kept] if towards == "kept" else torch.zeros(2, 3).double()
        centred = a - a.mean(0)
        root = (0.3 * centred.square().sum(0).mean()).sqrt()
        left = torch.cat([a, root * torch.eye(3).double()])
        right = torch.cat([y, root * target.T])
        if bias:
            left = torch.cat([left, torch.cat([torch.ones(30, 1), torch.zeros(3, 1)]).double()], 1)
        expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(trial.after.tensor("2.weight").detach(), expected[:, :3])
    assert ("2.bias" in trial.after.tensors()) == bias
    if bias:
        torch.testing.assert_close(trial.after.tensor("2.bias").detach(), expected[:, 3])
    (site,) = trial.applied
    error = (trial.after.run(x) - y).square().mean(0).sum() / y.var(0, unbiased=False).sum()
    assert site.facts["error_after"] == pytest.approx(float(error.sqrt()))


def test_later_layers_are_fitted_to_what_earlier_ones_now_yield() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(50, 3).double()
    trial, _ = refitted(RidgeRefit(ridge=0), model, x, {"0.weight[0]": [0, 1, 2, 3], "2.weight[0]": [0, 2, 4, 6]})
    with torch.no_grad():
        first = trial.after.tensor("0.weight"), trial.after.tensor("0.bias")
        second = trial.after.tensor("2.weight"), trial.after.tensor("2.bias")
        hidden = torch.tanh(nn.functional.linear(torch.tanh(nn.functional.linear(x, *first)), *second))
        ones = torch.ones(50, 1).double()
        expected = torch.linalg.lstsq(torch.cat([hidden, ones], 1), model(x)).solution.T
    torch.testing.assert_close(trial.after.tensor("4.weight").detach(), expected[:, :4])
    torch.testing.assert_close(trial.after.tensor("4.bias").detach(), expected[:, 4])


def test_systems_without_a_single_solution_get_the_least() -> None:
    a = torch.randn(2, 5, 9).double()
    y = torch.randn(2, 5, 3).double()
    a[1, :, 4] = 0
    found = solve(a.mT @ a, a.mT @ y, torch.zeros(2).double())
    torch.testing.assert_close(found, torch.linalg.pinv(a) @ y)


def test_groups_are_solved_one_by_one() -> None:
    gram = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 0.0]))]).double()
    found = solve(gram, torch.ones(2, 3, 1).double(), torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(found[..., 0], torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.0]]).double())


# -- text, refusals -------------------------------------------------------------------------------------------------


def test_text() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    trial, _ = refitted(RidgeRefit(), model, torch.randn(9, 2), {"0.weight[0]": [0, 2]})
    assert trial.text().splitlines() == [
        "-%linear_1: float64[9?, 3] = aten.linear.default(%relu, %_2_weight)",
        "+%_2_bias: float64[3] = @2.bias",
        "+%linear_1: float64[9?, 3] = aten.linear.default(%relu, %_2_weight, bias=%_2_bias)",
    ]
    assert [site.name for site in trial.applied] == ["2.weight", "4.weight"]
    facts = trial.applied[0].facts
    assert (facts["samples"], facts["inputs"]) == (9, 2)
    assert facts["error_after"] < 0.7 * facts["error_before"]
    assert trial.applied[0].reason == (
        f"error {facts['error_before']:.3g} -> {facts['error_after']:.3g} of the output's spread, "
        "from 9 samples of 2 inputs"
    )
    (skipped,) = trial.skipped
    assert (skipped.name, skipped.reason) == ("0.weight", "its output is what it was (error 0 of its spread)")


def reasons(each: RidgeRefit, model: nn.Module, x: Tensor, keep: dict[str, Any]) -> dict[str, str]:
    trial, _ = refitted(each, model, x, keep)
    return {site.name: site.reason for site in trial.skipped}


def test_refusals_have_reasons() -> None:
    found = reasons(RidgeRefit(), Twice(), torch.randn(9, 3), {"up.weight[0]": [0, 2]})
    shared = "is shared, by linear_{}, linear_{}: what fits one would not fit the others"
    assert found["down.weight in linear_2"] == f"down.weight {shared.format(2, 3)}"
    assert found["plain.weight in linear_5"] == f"plain.weight {shared.format(4, 5)}"
    assert found["mix"] == "einsum (aten.einsum.default) is an operator that this pass does not take apart"
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert reasons(RidgeRefit(width=3), model, torch.randn(9, 3), {"0.weight[0]": [0, 2, 4, 5]}) == {
        "2.weight": "its Gram matrix of 4 inputs would take 128 B; at most 3 are asked for (width)",
        "0.weight": "its output is what it was (error 0 of its spread)",
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.table(x)))))


def test_a_tied_weight_stays() -> None:
    graph, reference = cut(capture(Tied(), torch.arange(7)), {"up.weight[0]": [0, 1, 3]})
    trial = try_pass(RidgeRefit(), graph, calibration=[torch.arange(7)], reference=reference)
    assert [site.name for site in trial.applied] == ["down.weight"]
    (reason,) = [site.reason for site in trial.skipped if site.name.startswith(("head", "table"))]
    assert reason.startswith("head.weight is shared, by embedding, ")


def test_few_samples_are_said() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    x = torch.randn(5, 3).double()
    trial, _ = refitted(RidgeRefit(), model, x, {"0.weight[0]": np.arange(0, 20, 2)})
    (site,) = trial.applied
    assert site.reason.endswith("from 5 samples of 10 inputs; with as few samples as that the ridge decides")


@pytest.mark.parametrize("options", [{"ridge": -1.0}, {"ridge": float("nan")}, {"samples": -1}, {"width": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match="ridge and samples of 0 or above and a width of 1 or above"):
        RidgeRefit(**options)


def test_options_are_what_the_text_says() -> None:
    (each,) = Pipeline.parse("ridge-refit{ridge=0.1 towards=zero samples=0 width=100 bias=false}")
    assert each == RidgeRefit(0.1, "zero", 0, 100, False)


def test_calibration_data_is_needed() -> None:
    graph, reference = cut(
        capture(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.randn(2, 2)), {"0.weight[0]": [0]}
    )
    with pytest.raises(PipelineError, match=r"ridge-refit compares .* pass calibration=\[inputs, …\] to the call"):
        try_pass(RidgeRefit(), graph, reference=reference)


def test_nothing_was_removed() -> None:
    x = torch.randn(4, 2)
    trial = try_pass(RidgeRefit(), nn.Linear(2, 2), x, calibration=[x])
    assert trial.unchanged
    assert trial.context.notes == [
        "nothing was removed since the last lossless change, so there is nothing to fit anew"
    ]


# -- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(layers, min_size=1, max_size=4), st.sampled_from([0.0, 1e-2, 10.0]), st.booleans(), st.data())
def test_no_layer_gets_worse(plan: list[tuple[int, str]], ridge: float, bias: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    batches = [torch.randn(n, 4) + 1 for n in data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))]
    graph = capture(Generated(plan), batches[0])
    typing = infer(graph)
    keep = {g.atom: np.arange(data.draw(st.integers(0, g.size - 1)), g.size) for g in typing.groups}
    small, reference = pruned(typing, keep)
    trial = try_pass(RidgeRefit(ridge=ridge, bias=bias), small, calibration=batches, reference=reference)
    for site in trial.applied:
        assert site.facts["error_after"] < site.facts["error_before"]
    if [site.name for site in trial.applied] == ["head.weight"]:  # nothing before it changed
        x = torch.cat(batches)
        errors = [(g.run(x) - graph.run(x)).square().sum() for g in (trial.after, trial.before)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_whole_models_come_closer(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = {"convolutions": (convolutions, images), "attention": (attention, tokens)}[name]
    graph, reference = halved(capture(model(), inputs()))
    before = {n: t.clone() for n, t in [*reference.graph.tensors().items()]}
    shared = {n: t.clone() for n, t in graph.tensors().items()}
    data = [(torch.randn_like(inputs(16)), torch.zeros(16)), (torch.randn_like(inputs(8)), torch.zeros(8))]
    trial = try_pass(RidgeRefit(), graph, calibration=data, reference=reference)
    other = torch.randn_like(inputs(8))
    assert gap(trial, reference, other) < 0.7 * gap(trial, reference, other, trial.before)
    assert all(torch.equal(reference.graph.tensor(n), t) for n, t in before.items())
    assert all(torch.equal(graph.tensor(n), t) for n, t in shared.items())
    assert all(isinstance(trial.after.tensor(n), nn.Parameter) for n in trial.after.tensors() if n.endswith("weight"))


def test_samples_are_drawn_by_the_seed_and_bounded() -> None:
    graph, reference = halved(capture(convolutions(), images()))
    data = [images(4), images(3)]

    def run(seed: int, samples: int) -> Trial:
        return try_pass(RidgeRefit(samples=samples), graph, calibration=data, reference=reference, seed=seed)

    first, same, other, everything = run(0, 2), run(0, 2), run(1, 2), run(0, 0)
    weights = [trial.after.tensor("widen.weight") for trial in (first, same, other, everything)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    counts = {site.name: (site.facts["samples"], site.facts["inputs"]) for site in first.applied}
    assert counts["widen.weight"] == (145, 72)  # of each batch a share, rounded up
    assert {site.name: site.facts["samples"] for site in everything.applied}["widen.weight"] == 7 * 36


def test_in_a_pipeline() -> None:
    model, data = convolutions(), [images(4), images(3) + 1]

    def run() -> Any:
        return graphopt.optimize(
            model,
            images(),
            budget=graphopt.Budget(flops=0.5),
            pipeline="prune-channels,compensate-mean,ridge-refit",
            calibration=data,
        )

    result, again = run(), run()
    assert [record.changed for record in result.report.passes] == [True, True, True]
    state = result.module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.module.state_dict().items())
    result.module.train()(images(4)).sum().backward()
    assert all(p.grad is not None for p in result.module.parameters())
    further = graphopt.optimize(
        result.module,
        images(),
        budget=graphopt.Budget(flops=0.8),
        pipeline="prune-channels,ridge-refit",
        calibration=data,
    )
    assert further.report.after.flops < result.report.after.flops

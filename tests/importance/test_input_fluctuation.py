"""Fluctuation scores against the error that they stand for, and the moments that they are made of."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.allocation import Budget
from graphopt.axes.algebra import index_at
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PassError, PipelineError
from graphopt.importance import InputFluctuation, ScoreContext, consumers
from graphopt.passes.prune import PruneChannels
from graphopt.passes.recover import CompensateMean
from graphopt.pipeline import Pipeline
from graphopt.testing import try_pass
from tests.small_models import attention, convolutions, images, tokens

Metric = Literal["wifv", "ifv", "wifn"]
PLAIN = InputFluctuation(normalizer="none")


class Between(nn.Module):
    """What `front` makes, shifted, is read by `back`."""

    front: nn.Module
    back: nn.Module

    def __init__(self, front: nn.Module, back: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.front, self.back, self.shift = front, back, shift

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.front(x)) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.hidden(x))


class Product(nn.Module):
    """A matrix product with a parameter, on either side, perhaps one matrix for each of a stack."""

    def __init__(self, *shape: int, side: Literal["left", "right", "added"] = "right") -> None:
        super().__init__()
        self.weight, self.side = nn.Parameter(torch.randn(*shape)), side

    def forward(self, x: Tensor) -> Tensor:
        if self.side == "added":
            return torch.addmm(torch.ones(self.weight.shape[1], dtype=x.dtype), x, self.weight)
        return self.weight @ x if self.side == "left" else x @ self.weight


class Vector(nn.Module):
    """A linear layer with one output and no dimension for it."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).unsqueeze(-1)


class Rows(nn.Module):
    """A linear layer over the last dimension but one."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mT).mT


IMAGES = (9, 2, 7, 6)
# front, back, the input's shape, the dimension of the group in what `front` makes, and of the outputs of `back`.
CASES = {
    "linear": (nn.Linear(4, 6), nn.Linear(6, 3), (9, 4), -1, -1),
    "linear on tokens": (nn.Linear(4, 6), nn.Linear(6, 3, bias=False), (9, 5, 4), -1, -1),
    "linear with a vector": (nn.Linear(4, 6), Vector(6), (9, 4), -1, -1),
    "matmul": (nn.Linear(4, 6), Product(6, 3), (9, 5, 4), -1, -1),
    "matmul from the left": (Rows(4, 6), Product(3, 6, side="left"), (9, 4, 5), -2, -2),
    "addmm": (nn.Linear(4, 6), Product(6, 3, side="added"), (9, 4), -1, -1),
    "conv2d": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 3), IMAGES, 1, 1),
    "conv2d 1x1": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1), IMAGES, 1, 1),
    "conv2d with stride and dilation": (nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, (2, 3), (1, 2), 0, (3, 1)), IMAGES, 1, 1),
    "conv2d with padding": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 3, padding=(1, 2)), IMAGES, 1, 1),
    "conv2d padded to the same size": (nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, (2, 3), padding="same"), IMAGES, 1, 1),
    "conv1d": (nn.Conv1d(2, 6, 1), nn.Conv1d(6, 3, 3, stride=2), (9, 2, 8), 1, 1),
    "conv3d": (nn.Conv3d(2, 6, 1), nn.Conv3d(6, 3, (1, 2, 3)), (3, 2, 4, 3, 5), 1, 1),
    "transposed": (nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 3, 2, 2), IMAGES, 1, 1),
    "transposed with overlap": (nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 3, (3, 4), (2, 3), 1, 1), IMAGES, 1, 1),
    "transposed with dilation": (nn.Conv1d(2, 6, 1), nn.ConvTranspose1d(6, 3, 3, 2, 0, 1, dilation=2), (9, 2, 5), 1, 1),
}


def built(name: str, shift: float = 0.0) -> tuple[Between, Tensor]:
    front, back, shape, _, _ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    return Between(front, back, shift).double(), torch.randn(shape, dtype=torch.float64, generator=generator)


def removal_errors(model: Between, x: Tensor, dim: int, out: int) -> Tensor:
    """Delete one index after the other where `back` reads it, take the mean change out, and square what is left."""
    hidden = model.hidden(x)
    whole = model.back(hidden)
    errors = []
    for index in range(hidden.shape[dim]):
        cut = hidden.clone()
        cut.select(dim, index).zero_()
        change = (whole - model.back(cut)).movedim(out, -1).flatten(0, -2)
        errors.append((change - change.mean(0)).square().mean(0).sum())
    return torch.stack(errors)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Yield batches of 2 and a smaller last one, once."""
    yield from x.split(2)


def typed(model: nn.Module, x: Tensor) -> Typing:
    return infer(capture(model.eval(), (x,)))


def hidden_scores(typing: Typing, x: Tensor, metric: Metric = "wifv") -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the scores of the group of 6."""
    (group,) = [g for g in typing.groups if g.size == 6]
    return InputFluctuation(metric, normalizer="none").score(ScoreContext(typing, pieces(x)))[group.name]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch copies the input, which is all right
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_score_is_the_error_of_deleting_a_column_and_keeping_its_mean(name: str) -> None:
    model, x = built(name)
    _, _, _, dim, out = CASES[name]
    expected = removal_errors(model, x, dim, out)
    assert hidden_scores(typed(model, x), x) == pytest.approx(expected.numpy(), rel=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if "padd" not in name and "transp" not in name])
@torch.no_grad()
def test_a_large_mean_costs_no_digits(name: str) -> None:
    model, x = built(name)
    shifted, _ = built(name, 1e4)
    expected = hidden_scores(typed(model, x), x)
    assert hidden_scores(typed(shifted, x), x) == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_a_large_mean_in_single_precision_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Between(nn.Linear(4, 6), nn.Linear(6, 3), 1e4), torch.randn(33, 4)
    seen = torch.cat([model.hidden(part) for part in pieces(x)]).double()
    expected = seen.var(0, correction=0) * model.back.get_parameter("weight").double().square().sum(0)
    assert hidden_scores(typed(model, x), x) == pytest.approx(expected.numpy(), rel=1e-10)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=9), st.sampled_from(["wifv", "ifv", "wifn"]))
def test_how_data_is_cut_into_batches_does_not_matter(sizes: list[int], metric: Metric) -> None:
    x = torch.randn(sum(sizes), *IMAGES[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    criterion = InputFluctuation(metric)
    whole = criterion.score(ScoreContext(PADDED, [x]))
    parts = criterion.score(ScoreContext(PADDED, list(x.split(sizes))))
    assert all(parts[g] == pytest.approx(whole[g], rel=1e-9) for g in whole)


PADDED = typed(built("conv2d with padding")[0], built("conv2d with padding")[1])


@torch.no_grad()
def test_the_other_metrics_by_their_definition() -> None:
    model, x = built("conv2d with padding")
    hidden, weight = model.hidden(x), model.back.get_parameter("weight")
    assert hidden_scores(PADDED, x, "ifv") == pytest.approx(hidden.var((0, 2, 3), correction=0).numpy(), rel=1e-10)
    norm = hidden.square().mean((0, 2, 3)).sqrt()
    assert hidden_scores(PADDED, x, "wifn") == pytest.approx((weight.abs().mean((0, 2, 3)) * norm).numpy(), rel=1e-10)


@torch.no_grad()
def test_a_kernel_over_equal_values_acts_by_its_sum() -> None:
    # All the covariances of a window are the variance.
    back = nn.Conv2d(6, 3, 3).double()
    flat = torch.randn(40, 6, 1, 1, dtype=torch.float64).expand(-1, -1, 5, 5)
    front = nn.Conv2d(6, 6, 1).double()
    variance = torch.tanh(front(flat)[:, :, 0, 0]).var(0, correction=0)
    expected = variance * back.weight.sum((2, 3)).square().sum(0)
    assert hidden_scores(typed(Between(front, back), flat), flat) == pytest.approx(expected.numpy(), rel=1e-10)


class Grouped(nn.Module):
    """A grouped convolution reads channels that each of its groups has its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(2, 12, 1), nn.Conv2d(12, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.front(x)))


@torch.no_grad()
def test_a_grouped_convolution_loses_a_channel_of_each_group() -> None:
    model, x = Grouped().double(), torch.randn(IMAGES, dtype=torch.float64)
    typing = typed(model, x)
    (group,) = [g for g in typing.groups if g.role == "channels in each conv group" and g.size == 6]
    assert [str(place) for place in group.places][-1] == "back.weight[1]"
    hidden = torch.tanh(model.front(x))
    errors = []
    for index in range(6):
        cut = hidden.clone()
        cut[:, [index, 6 + index]] = 0
        change = (model.back(hidden) - model.back(cut)).movedim(1, -1).flatten(0, -2)
        errors.append(float((change - change.mean(0)).square().mean(0).sum()))
    found = PLAIN.score(ScoreContext(typing, pieces(x)))
    assert found[group.name] == pytest.approx(errors, rel=1e-10)


class Experts(nn.Module):
    """A stack of matrices with a hidden width in common."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up) @ self.down


@torch.no_grad()
def test_every_matrix_of_a_stack_has_columns_of_its_own() -> None:
    model, x = Experts().double(), torch.randn(9, 3, 5, 4, dtype=torch.float64)
    typing = typed(model, x)
    hidden = torch.tanh(x @ model.up)
    expected = (hidden.var((0, 2), correction=0) * model.down.square().sum(2)).sum(0)
    assert hidden_scores(typing, x) == pytest.approx(expected.numpy(), rel=1e-10)


class Shared(nn.Module):
    """Two layers read one width, one of them in one half of a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.other = nn.Linear(4, 6), nn.Linear(4, 5)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.front(x))
        return self.one(hidden), self.two(torch.cat([torch.tanh(self.other(x)), hidden], -1))


@torch.no_grad()
def test_consumers_add_up() -> None:
    model, x = Shared().double(), torch.randn(9, 4, dtype=torch.float64)
    norms = model.one.weight.square().sum(0) + model.two.weight[:, 5:].square().sum(0)
    expected = torch.tanh(model.front(x)).var(0, correction=0) * norms
    assert hidden_scores(typed(model, x), x) == pytest.approx(expected.numpy(), rel=1e-10)


class Heads(nn.Module):
    """Attention of two query heads to each of two key heads, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 10)
        self.proj, self.fused = nn.Linear(20, 6), fused

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x).unflatten(-1, (4, 3)), self.k(x).unflatten(-1, (2, 3)), self.v(x).unflatten(-1, (2, 5))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            mixed = (q @ k.mT * 3**-0.5).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mixed(x))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_head_scores_its_columns_and_a_query_width_what_it_adds_to_the_products(fused: bool) -> None:
    model, x = Heads(fused).double(), torch.randn(9, 7, 6, dtype=torch.float64)
    typing = typed(model, x)
    found = PLAIN.score(ScoreContext(typing, pieces(x)))
    columns = model.mixed(x).flatten(0, 1).var(0, correction=0) * model.proj.weight.square().sum(0)
    q, k, _ = model.split(x)
    products = q.unsqueeze(-2) * k.repeat_interleave(2, 1).unsqueeze(-3)  # (n, heads, l, s, width)
    seen = products - products.mean(3, keepdim=True) if fused else products
    (width,) = [group for group in typing.groups if group.role == "qk dim"]
    (heads,) = [g for g in typing.groups if "heads" in g.role and any(p.tensor == "k.weight" for p in g.places)]
    assert found[width.name] == pytest.approx(seen.square().mean((0, 1, 2, 3)).numpy(), rel=1e-10)
    axis = next(place.axis for place in heads.places if place.tensor == "proj.weight")
    head_of = torch.from_numpy(index_at(axis, heads.atom))
    expected = torch.zeros(2, dtype=torch.float64).index_add(0, head_of, columns)
    assert found[heads.name] == pytest.approx(expected.numpy(), rel=1e-10)


def test_a_group_that_nothing_reads_scores_magnitudes_and_says_so() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = Between(nn.Linear(4, 6), nn.Linear(6, 4)), nn.Linear(4, 5)
            self.last = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,ij->nj", torch.tanh(self.head(self.read(x))), self.last)

    model, x = Einsum(), torch.randn(8, 4)
    context = ScoreContext(typed(model, x), [x])
    (group,) = [g for g in context.typing.groups if g.size == 5]
    found = PLAIN.score(context)[group.name]
    squares = model.head.weight.square().sum(1) + model.head.bias.square() + model.last.square().sum(1)
    assert found / found.sum() == pytest.approx((squares / squares.sum()).detach().numpy(), rel=1e-5)
    assert context.notes == {
        group.name: "scored by squared magnitude: no linear layer, convolution or matrix product reads it"
    }


@pytest.mark.parametrize(("model", "x"), [(attention(), tokens(8)), (convolutions(), images(8))])
def test_whole_models_are_pruned_by_it_without_labels(model: nn.Module, x: Tensor) -> None:
    each = PruneChannels(importance=InputFluctuation(), budget=Budget(flops=0.6))
    trial = try_pass(each, model, (x[:2],), calibration=list(x.split(3)))
    assert trial.cost.flops <= 0.6 * trial.context.original.flops
    assert not any("scored by squared magnitude" in site.reason for site in trial.context.sites)
    assert trial.difference() < 1e-9 or any(site.facts["normalised"] for site in trial.applied)


def test_taps_are_laid_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = built("conv2d with padding")
    whole = PLAIN.score(ScoreContext(PADDED, [x]))
    monkeypatch.setattr(consumers, "CHUNK", 100)
    cut = PLAIN.score(ScoreContext(PADDED, [x]))
    assert all(cut[g] == pytest.approx(whole[g], rel=1e-10) for g in whole)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, PipelineError, r"needs activations: pass calibration=\[inputs"),
        ([], PipelineError, "holds no batch"),
        (
            [torch.full(IMAGES, torch.nan, dtype=torch.float64)],
            PassError,
            "what conv2d_1 reads in the calibration data is not",
        ),
        ([torch.zeros(2, 5)], PipelineError, "batch 0 of the calibration data does not fit"),
    ],
)
def test_it_says_what_it_lacks(calibration: list[Tensor] | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PLAIN.score(ScoreContext(PADDED, calibration))


def test_a_model_without_consumers_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Linear(4, 6), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.up(x) * self.scale).sum(-1)

    with pytest.raises(
        PipelineError, match="needs a group that a linear layer, a convolution or a matrix product reads"
    ):
        PLAIN.score(ScoreContext(typed(Scale(), torch.randn(8, 4)), [torch.randn(8, 4)]))


@pytest.mark.parametrize("name", ["linear", "matmul", "conv2d", "conv2d with padding"])
@torch.no_grad()
def test_what_a_real_removal_with_its_mean_kept_costs_is_the_score(name: str) -> None:
    model, x = built(name)
    data = list(pieces(x))
    scores = hidden_scores(typed(model, x), x)
    original = sum(p.numel() for p in model.parameters())
    per_index = sum(p.numel() for p in model.front.parameters()) // 6 + model.back.get_parameter("weight").numel() // 6
    pruned = graphopt.optimize(
        model,
        (x[:2],),
        pipeline=Pipeline(
            [
                PruneChannels(importance=PLAIN, budget=Budget(params=float(original - per_index))),
                CompensateMean(propagate=False),
            ]
        ),
        calibration=data,
    )
    (kept,) = {len(sizes[0]) for tensor, sizes in pruned.plan.keep.items() if tensor == "front.weight"}
    assert kept == 5
    _, _, _, _, out = CASES[name]
    change = (model(x) - pruned.module(x)).movedim(out, -1).flatten(0, -2)
    assert float(change.square().mean(0).sum()) == pytest.approx(scores.min(), rel=1e-9)

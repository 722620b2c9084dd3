"""Scales of batch norms as scores, and what stands in where there are none."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.allocation import Budget
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PipelineError
from graphopt.importance import BNGamma, ScoreContext
from graphopt.passes.prune import PruneChannels
from graphopt.testing import try_pass


class Residual(nn.Module):
    """A residual width under two batch norms, an inner width under one, and a hidden width under none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.up, self.up_norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.down, self.down_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + self.down_norm(self.down(torch.relu(self.up_norm(self.up(x)))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return model


IMAGES = torch.randn(2, 2, 6, 6)


def typing_of(model: nn.Module) -> Typing:
    return infer(capture(model, (IMAGES,)))


RESIDUAL = typing_of(residual())


@pytest.mark.parametrize(("over", "factor"), [("mean", 0.5), ("sum", 1.0)])
def test_a_group_scores_the_scales_over_it(over: str, factor: float) -> None:
    model = residual()
    found = BNGamma(over, "none").score(ScoreContext(typing_of(model)))  # type: ignore[arg-type]
    both = model.stem_norm.weight.abs() + model.down_norm.weight.abs()
    assert found["stem.weight[0]"] == pytest.approx((both * factor).detach().numpy(), rel=1e-6)
    assert found["up.weight[0]"] == pytest.approx(model.up_norm.weight.abs().detach().numpy(), rel=1e-6)


def test_a_group_without_batch_norm_scores_magnitudes_of_the_mean_and_says_so() -> None:
    model = residual()
    context = ScoreContext(typing_of(model))
    found = BNGamma(normalizer="none").score(context)
    squares = model.hidden.weight.square().sum(1) + model.hidden.bias.square() + model.head.weight.square().sum(0)
    hidden = found["hidden.weight[0]"]
    assert hidden / hidden.sum() == pytest.approx((squares / squares.sum()).detach().numpy(), rel=1e-5)
    others = np.concatenate([found["stem.weight[0]"], found["up.weight[0]"]])
    assert hidden.mean() == pytest.approx(others.mean())
    assert context.notes == {"hidden.weight[0]": "scored by squared magnitude: no batch norm has it"}


def test_the_report_says_which_groups_had_no_batch_norm() -> None:
    trial = try_pass(PruneChannels(importance=BNGamma(), budget=Budget(flops=0.6)), residual(), (IMAGES,))
    said = {site.name: site.reason for site in trial.context.sites}
    assert "scored by squared magnitude: no batch norm has it" in said["hidden.weight[0]"]
    assert "magnitude" not in said["up.weight[0]"]


@given(st.floats(1e-3, 1e3))
def test_rescaling_a_convolution_before_a_batch_norm_changes_nothing(scale: float) -> None:
    typing = RESIDUAL
    before = BNGamma().score(ScoreContext(typing))
    weight = typing.graph.tensor("up.weight")
    typing.graph.set_tensor("up.weight", nn.Parameter(weight.detach() * scale))
    after = BNGamma().score(ScoreContext(typing))
    typing.graph.set_tensor("up.weight", weight)
    assert after["up.weight[0]"] == pytest.approx(before["up.weight[0]"])


class Concatenated(nn.Module):
    """One batch norm over two groups side by side, of which one occurs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.norm(torch.cat([a, self.b(x), a], 1)))


def test_a_batch_norm_over_a_concatenation_scores_each_part() -> None:
    model = Concatenated().eval()
    nn.init.normal_(model.norm.weight)
    found = BNGamma(normalizer="none").score(ScoreContext(typing_of(model)))
    scales = model.norm.weight.abs().detach().numpy()
    assert found["a.weight[0]"] == pytest.approx((scales[:3] + scales[5:]) / 2, rel=1e-6)
    assert found["b.weight[0]"] == pytest.approx(scales[3:5], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)), 1),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)), 1),
    ],
    ids=["none", "no scale", "over the output alone"],
)
def test_without_a_scale_over_any_group_it_refuses(model: nn.Module, count: int) -> None:
    with pytest.raises(PipelineError, match=f"the graph has {count} batch norms, none of them with a weight over"):
        BNGamma().score(ScoreContext(typing_of(model.eval())))

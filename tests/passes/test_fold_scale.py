"""Check the pass that folds scales and shifts by constants into the layer before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.passes import FoldScale
from graphopt.testing import Trial, try_pass
from tests.random_graphs import Sample, samples


def vector(size: int, *shape: int) -> nn.Parameter:
    values = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.5
    return nn.Parameter(values.view(shape or (size,)))


class Scaled(nn.Module):
    """A residual block of ConvNeXt: linear layers over the last dimension, and a scale over the second."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
        self.gamma, self.places = vector(4), vector(5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        y = self.down(torch.relu(0.5 * self.up(y) * self.places[:, None]))
        return x + y.permute(0, 3, 1, 2) * self.gamma.reshape(1, -1, 1, 1)


def images() -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fold(model: nn.Module, *, trainable: bool = False) -> Trial:
    return try_pass(FoldScale(trainable), model.double().eval(), images())


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    done = fold(Scaled())
    assert [line for line in done.text().splitlines() if "sym_size" not in line] == [
        "-%gamma: float64[4] = @gamma",
        "-%mul: float64[2?, 3, 5, 6] = aten.mul.Tensor(%linear, 0.5)",
        "-%mul_1: float64[2?, 3, 5, 6] = aten.mul.Tensor(%mul, %unsqueeze)",
        "+%mul_1: float64[2?, 3, 5, 6] = aten.mul.Tensor(%linear, %unsqueeze)",
        "-%reshape: float64[1, 4, 1, 1] = aten.reshape.default(%gamma, [1, -1, 1, 1])",
        "-%mul_2: float64[2?, 4, 3, 5] = aten.mul.Tensor(%permute_1, %reshape)",
        "-%add: float64[2?, 4, 3, 5] = aten.add.Tensor(%x, %mul_2)",
        "+%add: float64[2?, 4, 3, 5] = aten.add.Tensor(%x, %permute_1)",
    ]
    assert {site.name: site.reason for site in done.applied} == {
        "mul": "a number into up.weight",
        "mul_2": "gamma into down.weight",
    }
    assert {site.name: site.reason for site in done.skipped} == {
        "mul_1": "dimension 2 of linear is mapped, whose channels are in dimension 3"
    }
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged
    assert set(done.after.module.state_dict()) == {"up.weight", "up.bias", "down.weight", "places"}


def test_training_keeps_what_is_trained() -> None:
    done = fold(Scaled(), trainable=True)
    assert [site.name for site in done.applied] == ["mul"]
    assert {site.name: site.reason for site in done.skipped}["mul_2"] == (
        "gamma is trained by itself (trainable=false folds it)"
    )
    assert done.difference() < 1e-12


# -- meaning --------------------------------------------------------------------------------------------------------


class After(nn.Module):
    """A layer, and a function of its result and a vector."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor, Tensor], Any], gain: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.function, self.gain = layer, function, gain

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x), self.gain)


PLANE = (1, -1, 1, 1)

FOLDED: dict[str, nn.Module] = {
    "product": After(nn.Conv2d(4, 6, 1), lambda y, g: g.view(PLANE) * y, vector(6)),
    "product in place": After(nn.Conv2d(4, 6, 1), lambda y, g: y.mul_(g.view(PLANE)) + 1, vector(6)),
    "sum": After(nn.Conv2d(4, 6, 1), lambda y, g: y + g, vector(6, 6, 1, 1)),
    "sum without a bias": After(nn.Conv2d(4, 6, 3, padding=1, bias=False), lambda y, g: y + g, vector(6, 6, 1, 1)),
    "difference": After(nn.Conv2d(4, 6, 1), lambda y, g: y - g, vector(6, 6, 1, 1)),
    "quotient": After(nn.Conv2d(4, 6, 1), lambda y, g: y / g, vector(6, 6, 1, 1)),
    "one number for all": After(nn.Conv2d(4, 6, 1, bias=False), lambda y, g: y * g + 3, vector(1)),
    "several": After(nn.Conv2d(4, 6, 1), lambda y, g: (2 * y + 1) * g / 3 - g, vector(6, 6, 1, 1)),
    "linear": After(nn.Linear(5, 6), lambda y, g: (y * g).flatten(2) + 0.1, vector(6)),
    "through a reshape": After(nn.Linear(5, 6), lambda y, g: y.flatten(1, 2) * g, vector(6)),
    "transposed": After(nn.ConvTranspose2d(4, 6, 3, groups=2), lambda y, g: y * g, vector(6, 6, 1, 1)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_the_result_computes_the_same(name: str) -> None:
    done = fold(FOLDED[name])
    left = {str(node.target).split(".")[1] for node in done.after.nodes if node.op == "call_function"}
    assert left.isdisjoint({"mul", "div", "sub"})
    assert "gain" not in done.after.module.state_dict()
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


KEPT: dict[str, tuple[nn.Module, str | None]] = {
    "read by others": (
        After(nn.Conv2d(4, 6, 1), lambda y, g: y * g + y.relu(), vector(6, 6, 1, 1)),
        "conv2d has 2 readers (mul, relu)",
    ),
    "a matrix": (After(nn.Linear(5, 6), lambda y, g: y * g, vector(18, 3, 6)), None),
    "what varies": (After(nn.Linear(5, 6), lambda y, g: y * y.mean(-1, keepdim=True), vector(1)), None),
    "no layer": (After(nn.ReLU(), lambda y, g: y * g, vector(5)), None),
    "a divisor": (After(nn.Linear(5, 6), lambda y, g: g / y, vector(6)), None),
    "a multiple": (After(nn.Linear(5, 6), lambda y, g: torch.add(y, g, alpha=2), vector(6)), None),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_constant_map_of_channels_stays(name: str) -> None:
    model, reason = KEPT[name]
    done = fold(model)
    assert done.unchanged
    assert [site.reason for site in done.skipped] == ([] if reason is None else [reason])


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples())
def test_random_graphs_compute_the_same(sample: Sample) -> None:
    note(repr(sample))
    done = try_pass(FoldScale(), capture(sample.module.double().eval(), sample.inputs))
    assert done.difference() < 1e-9
    assert done.again().unchanged

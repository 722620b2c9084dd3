"""Check that two linear maps in a row become their product where that is cheaper, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.passes import MergeConsecutive
from graphopt.plan import Plan
from graphopt.testing import Trial, try_pass

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


def row(*layers: nn.Module, inputs: Tensor | None = None) -> Trial:
    """Run the pass on layers in a row."""
    torch.manual_seed(0)
    return try_pass(
        MergeConsecutive(),
        nn.Sequential(*layers).double().eval(),
        torch.randn(2, 3, 8, 9, dtype=torch.float64) if inputs is None else inputs.double(),
    )


# -- text -------------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial = row(nn.Linear(4, 8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(2, 5), inputs=torch.randn(3, 4))
    assert trial.text().splitlines() == [
        "-%_0_weight: float64[8, 4] = @0.weight",
        "-%_0_bias: float64[8] = @0.bias",
        "-%_1_weight: float64[5, 8] = @1.weight",
        "-%_1_bias: float64[5] = @1.bias",
        "-%linear: float64[3?, 8] = aten.linear.default(%input_1, %_0_weight, %_0_bias)",
        "-%linear_1: float64[3?, 5] = aten.linear.default(%linear, %_1_weight, %_1_bias)",
        "-%relu: float64[3?, 5] = aten.relu.default(%linear_1)",
        "+%_0_1_weight: float64[5, 4] = @0_1.weight",
        "+%_0_1_bias: float64[5] = @0_1.bias",
        "+%linear_default: float64[3?, 5] = aten.linear.default(%input_1, %_0_1_weight, %_0_1_bias)",
        "+%relu: float64[3?, 5] = aten.relu.default(%linear_default)",
    ]
    assert [(site.name, site.reason) for site in trial.applied] == [
        ("linear, linear_1", "merged: 216 -> 60 multiply-adds, 85 -> 25 parameters"),
    ]
    assert [(site.name, site.reason) for site in trial.skipped] == [
        ("linear_2, linear_3", "one map would be dearer: 60 -> 75 multiply-adds, 27 -> 30 parameters"),
    ]
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged


class Shared(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "several readers":
            return self.second(y) + y.sum()
        if self.how == "shared":
            return self.second(y) + self.second(x.repeat(1, 2))
        if self.how == "computed":
            return nn.functional.linear(y, self.second.weight * 2)
        x = x * 2
        y = self.first(x)
        x.relu_()
        return x + self.second(y)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("several readers", "sum_1 read linear, too"),
        ("shared", "second.weight is shared: linear_1, linear_2 read it"),
        ("computed", "mul is computed, not a tensor of the model"),
        ("written", "relu_ writes into mul before linear_2 runs"),
    ],
)
def test_refusals_have_reasons(how: str, reason: str) -> None:
    trial = try_pass(MergeConsecutive(), Shared(how).eval(), torch.randn(2, 4))
    assert trial.unchanged
    found = [site.reason for site in trial.skipped]
    assert reason in found


def test_zero_padding_after_a_bias_is_refused() -> None:
    trial = row(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 3, padding=1))
    assert [site.reason for site in trial.skipped] == [
        "conv2d_1 pads with zeros [1, 1], where one convolution would have the bias of conv2d"
    ]
    assert trial.unchanged
    trial = row(nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1))
    assert trial.applied
    assert trial.difference() < 1e-9


def test_two_kernels_with_an_extent_are_refused() -> None:
    trial = row(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, (1, 3)))
    assert [site.reason for site in trial.skipped] == ["both kernels have an extent in spatial dimension 1 (3, 3)"]


# -- meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("wide_first", [True, False])
def test_convolutions(rank: int, wide_first: bool) -> None:
    conv: Any = CONVOLUTIONS[rank - 1]
    wide: dict[str, Any] = {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2 if wide_first else 0}
    first, second = (wide, {"kernel_size": 1, "stride": 2}) if wide_first else ({"kernel_size": 1, "stride": 2}, wide)
    inputs = torch.randn(2, 3, *[15] * rank)
    trial = row(conv(3, 40, **first), conv(40, 4, **second), inputs=inputs)
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged


def test_a_whole_row_becomes_one() -> None:
    trial = row(nn.Linear(4, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 3), inputs=torch.randn(2, 5, 4))
    assert trial.after.text().count("aten.linear") == 1
    assert len(trial.applied) == 2
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_depthwise_maps_stay_depthwise() -> None:
    trial = row(nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 6, 1, groups=6), inputs=torch.randn(2, 6, 8, 9))
    assert trial.applied
    (weight,) = [tensor for name, tensor in trial.after.tensors().items() if name.endswith("weight")]
    assert weight.shape == (6, 1, 3, 3)
    assert trial.difference() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    layers = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 5)).to(dtype).eval()
    trial = try_pass(MergeConsecutive(), layers, torch.randn(2, 4, dtype=dtype))
    weights = [trial.before.tensor(f"{i}.weight").detach().double() for i in (0, 1)]
    exact = (weights[1] @ weights[0]).to(dtype)
    assert torch.equal(trial.after.tensor("0_1.weight"), exact)


def test_plans_speak_of_the_outer_widths() -> None:
    trial = row(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Linear(6, 20),
        nn.Linear(20, 7),
        nn.ReLU(),
        nn.Linear(7, 2),
        inputs=torch.randn(2, 4),
    )
    typing: Typing = infer(trial.after)
    keep = {group.atom: torch.arange(2, group.size).numpy() for group in typing.groups}
    plan = Plan.of(typing, keep)
    assert {name: {dim: len(kept) for dim, kept in dims.items()} for name, dims in plan.keep.items()} == {
        "0.weight": {0: 4},
        "0.bias": {0: 4},
        "2.weight": {1: 4},
        "3.weight": {0: 5},
        "3.bias": {0: 5},
        "5.weight": {1: 5},
    }


# -- properties -------------------------------------------------------------------------------------------------------

LAYER = st.fixed_dictionaries(
    {
        "out": st.sampled_from([2, 4, 8, 12]),
        "kernel": st.tuples(st.sampled_from([1, 1, 3]), st.sampled_from([1, 1, 2])),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "padding": st.tuples(st.integers(0, 1), st.integers(0, 1)),
        "groups": st.sampled_from([1, 1, 2, 4]),
        "bias": st.booleans(),
        "relu": st.sampled_from([False, False, True]),
    }
)


@settings(max_examples=20)
@given(st.lists(LAYER, min_size=2, max_size=3))
def test_random_rows(drawn: list[dict[str, Any]]) -> None:
    layers: list[nn.Module] = []
    channels = 4
    for each in drawn:
        groups = each["groups"] if channels % each["groups"] == 0 and each["out"] % each["groups"] == 0 else 1
        options = {name: each[name] for name in ("stride", "dilation", "padding", "bias")}
        layers.append(nn.Conv2d(channels, each["out"], each["kernel"], groups=groups, **options))
        layers.extend([nn.ReLU()] if each["relu"] else [])
        channels = each["out"]
    model = nn.Sequential(*layers).double().eval()
    inputs = torch.randn(2, 4, 33, 31, dtype=torch.float64)
    model(inputs)
    trial = try_pass(MergeConsecutive(), model, inputs)
    assert trial.difference() < 1e-9
    assert trial.again().unchanged
    assert trial.cost.macs <= trial.context.original.macs
    assert trial.cost.params <= trial.context.original.params
    other = torch.randn(3, 4, 33, 31, dtype=torch.float64)
    torch.testing.assert_close(trial.after.run(other), trial.before.run(other))


def test_inputs_stay_dynamic() -> None:
    trial = try_pass(MergeConsecutive(), capture(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), torch.randn(2, 4)))
    assert trial.after.run(torch.randn(11, 4)).shape == (11, 2)

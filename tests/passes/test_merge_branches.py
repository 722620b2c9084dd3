"""Check that branches of a sum that read one input become one operator, in the ways in which they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.dialects.aten import infer
from graphopt.passes import MergeBranches
from graphopt.plan import Plan
from graphopt.testing import Trial, try_pass

Forward = Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    """Branches of one input, summed as a function says."""

    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def merged(forward: Forward, *, inputs: Tensor | None = None, options: Any = None, **parts: nn.Module) -> Trial:
    """Run the pass on a block with random statistics."""
    torch.manual_seed(0)
    module = Block(forward, **parts).double()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor))
    given_inputs = torch.randn(2, 6, 8, 9) if inputs is None else inputs
    return try_pass(MergeBranches(**options or {}), module.eval(), given_inputs.double())


def two(s: Any, x: Tensor) -> Tensor:
    return (s.wide(x) + s.point(x)).relu()


def three(s: Any, x: Tensor) -> Tensor:
    return (s.wide(x) + s.point(x) + s.norm(x)).relu()


def conv(out: int = 6, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, out, kernel, **{"padding": 1 if kernel == 3 else 0, **options})


# -- text -------------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial = merged(three, wide=conv(), point=conv(kernel=1, bias=False), norm=nn.BatchNorm2d(6))
    assert trial.text().splitlines() == [
        "-%wide_weight: float64[6, 6, 3, 3] = @wide.weight",
        "-%wide_bias: float64[6] = @wide.bias",
        "-%point_weight: float64[6, 6, 1, 1] = @point.weight",
        "-%norm_weight: float64[6] = @norm.weight",
        "-%norm_bias: float64[6] = @norm.bias",
        "-%norm_running_mean: float64[6] = @norm.running_mean",
        "-%norm_running_var: float64[6] = @norm.running_var",
        "-%conv2d: float64[2?, 6, 8, 9] = aten.conv2d.default(%x, %wide_weight, %wide_bias, [1, 1], [1, 1])",
        "-%conv2d_1: float64[2?, 6, 8, 9] = aten.conv2d.default(%x, %point_weight)",
        "-%add: float64[2?, 6, 8, 9] = aten.add.Tensor(%conv2d, %conv2d_1)",
        "-%batch_norm: float64[2?, 6, 8, 9] = aten.batch_norm.default(%x, %norm_weight, %norm_bias, "
        "%norm_running_mean, %norm_running_var, False, 0.1, 1e-05, False)",
        "-%add_1: float64[2?, 6, 8, 9] = aten.add.Tensor(%add, %batch_norm)",
        "-%relu: float64[2?, 6, 8, 9] = aten.relu.default(%add_1)",
        "+%wide_point_norm_weight: float64[6, 6, 3, 3] = @wide_point_norm.weight",
        "+%wide_point_norm_bias: float64[6] = @wide_point_norm.bias",
        "+%conv2d_default: float64[2?, 6, 8, 9] = aten.conv2d.default(%x, %wide_point_norm_weight, "
        "%wide_point_norm_bias, [1, 1], [1, 1], [1, 1], 1)",
        "+%relu: float64[2?, 6, 8, 9] = aten.relu.default(%conv2d_default)",
    ]
    (site,) = trial.applied
    assert (site.name, site.reason) == (
        "add_1: conv2d, conv2d_1, batch_norm",
        "merged 3 branches of x: 51,840 -> 46,656 multiply-adds, 378 -> 330 parameters",
    )
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged


def reasons(forward: Forward, **given: Any) -> list[str]:
    trial = merged(forward, **given)
    assert trial.difference() < 1e-9
    return [site.reason for site in trial.skipped]


def test_refusals_have_reasons() -> None:
    def normed(s: Any, x: Tensor) -> Tensor:
        return s.wide(x) + s.norm(s.point(x))

    def shared(s: Any, x: Tensor) -> Tensor:
        return s.wide(x) + s.point(x) + s.point(x.relu())

    def read_twice(s: Any, x: Tensor) -> Tensor:
        y = s.point(x)
        return (s.wide(x) + y) * y.sum()

    def written(s: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = s.wide(x)
        x.view(-1).relu_()
        return y + s.point(x)

    norm = {"norm": nn.BatchNorm2d(6)}
    assert reasons(normed, wide=conv(), point=conv(kernel=1), **norm) == [
        "it is a batch norm of conv2d_1, which belongs into that first (fold-batch-norm)",
        "no other branch can be merged with it",
    ]
    assert reasons(two, wide=conv(stride=2, padding=1), point=conv(kernel=1, stride=2, padding=0)) == []
    off_centre: dict[str, Any] = {"wide": conv(stride=2), "point": conv(kernel=2, stride=2)}
    assert reasons(two, inputs=torch.randn(2, 6, 8, 8), **off_centre) == [
        "no other branch has its stride [2, 2] and centre [0, 0]",
        "no other branch has its stride [2, 2] and centre [-1, -1]",
    ]
    assert reasons(two, wide=conv(groups=6), point=conv(kernel=1)) == [
        "one operator would be dearer: 12,960 -> 46,656 multiply-adds, 102 -> 330 parameters"
    ]
    assert reasons(shared, wide=conv(), point=conv(kernel=1))[:1] == [
        "point.weight is shared: conv2d_1, conv2d_2 read it"
    ]
    assert "mul read conv2d, too" not in reasons(read_twice, wide=conv(), point=conv(kernel=1))
    assert reasons(written, wide=conv(), point=conv(kernel=1)) == ["relu_ writes into mul before the sum is formed"]
    given: dict[str, Any] = {"wide": conv(), "point": conv(kernel=1), **norm}
    assert reasons(three, options={"fold_batch_norms": False}, **given) == [
        "it is a batch norm, which behaves otherwise in training (fold_batch_norms=false)"
    ]


# -- meaning ----------------------------------------------------------------------------------------------------------


def plus_input(s: Any, x: Tensor) -> Tensor:
    return (s.wide(x) + x).relu()


def input_first(s: Any, x: Tensor) -> Tensor:
    return x + (s.point(x) + s.wide(x))


def in_place(s: Any, x: Tensor) -> Tensor:
    y = s.wide(x)
    y += s.point(x)
    y += x
    return y.relu_()


def with_another(s: Any, x: Tensor) -> Tensor:
    y = s.wide(x)
    y += x.sigmoid()
    y += s.point(x)
    return y


def two_inputs(s: Any, x: Tensor) -> Tensor:
    y = x.sigmoid()
    return s.wide(x) + s.point(y) + y + x


def doubled(s: Any, x: Tensor) -> Tensor:
    return s.wide(x) + x + s.point(x) + x


def listed(s: Any, x: Tensor) -> Tensor:
    y = s.wide(x)
    y += sum([s.point(x), x])
    return y


FORWARDS = [listed, two, plus_input, input_first, in_place, with_another, two_inputs, doubled]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_any_way_of_adding_up(forward: Forward, groups: int) -> None:
    trial = merged(forward, wide=conv(groups=groups, bias=False), point=conv(kernel=1, groups=groups))
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged
    assert trial.cost.macs <= trial.context.original.macs
    other = torch.randn(3, 6, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(trial.after.run(other), trial.before.run(other))


def test_kernels_of_many_forms() -> None:
    def every(s: Any, x: Tensor) -> Tensor:
        return s.square(x) + s.row(x) + s.column(x) + s.point(x) + s.holes(x)

    parts = {
        "square": conv(kernel=3, padding=1, stride=2),
        "row": conv(kernel=(1, 3), padding=(0, 1), stride=2),
        "column": conv(kernel=(5, 1), padding=(2, 0), stride=2),
        "point": conv(kernel=1, stride=2),
        "holes": conv(kernel=3, padding=2, dilation=2, stride=2),
    }
    trial = merged(every, inputs=torch.randn(2, 6, 11, 12), **parts)
    assert [site.reason.split(":")[0] for site in trial.applied] == ["merged 5 branches of x"]
    assert trial.after.tensor("square_and_4_more.weight").shape == (6, 6, 5, 5)
    assert trial.difference() < 1e-9


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int) -> None:
    of: Any = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1]
    norm: Any = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][rank - 1]
    parts = {"wide": of(6, 6, 3, padding=1), "point": of(6, 6, 1), "norm": norm(6, affine=rank == 1)}
    trial = merged(three, inputs=torch.randn(2, 6, *[5] * rank), **parts)
    assert trial.applied
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_linear_layers() -> None:
    parts = {"wide": nn.Linear(6, 6), "point": nn.Linear(6, 6, bias=False), "norm": nn.BatchNorm1d(6)}
    trial = merged(lambda s, x: (s.wide(x) + s.norm(x) + s.point(x) + x).relu(), inputs=torch.randn(4, 6), **parts)
    assert trial.after.text().count("aten.") == 2
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_an_input_that_is_written_into_stays() -> None:
    def residual(s: Any, x: Tensor) -> Tensor:
        y = x.sigmoid()
        z = y + 1
        y += s.wide(y)
        return y * z

    trial = merged(residual, wide=conv())
    assert trial.difference() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_formed_in_float64(dtype: torch.dtype) -> None:
    module = Block(two, wide=nn.Linear(6, 6), point=nn.Linear(6, 6)).to(dtype).eval()
    trial = try_pass(MergeBranches(), module, torch.randn(2, 6, dtype=dtype))
    sum_of = module.wide.weight.detach().double() + module.point.weight.detach().double()  # type: ignore[operator, union-attr]
    assert torch.equal(trial.after.tensor("wide_point.weight"), sum_of.to(dtype))
    assert isinstance(trial.after.tensor("wide_point.weight"), nn.Parameter)


def test_plans_speak_of_every_branch() -> None:
    def narrow(s: Any, x: Tensor) -> Tensor:
        return s.last(three(s, s.first(x).relu()))

    parts: dict[str, Any] = {
        "first": conv(),
        "wide": conv(),
        "point": conv(kernel=1),
        "norm": nn.BatchNorm2d(6),
        "last": conv(2),
    }
    trial = merged(narrow, **parts)
    assert trial.applied
    typing = infer(trial.after)
    inner = next(group for group in typing.groups if "wide_point_norm.bias" in {p.tensor for p in group.places})
    plan = Plan.of(typing, {inner.atom: np.array([0, 2, 5])})
    lost = {(name, dim) for name, dims in plan.keep.items() for dim in dims}
    assert {("wide.weight", 0), ("wide.bias", 0), ("point.weight", 0), ("norm.weight", 0), ("norm.bias", 0)} <= lost


# -- properties -------------------------------------------------------------------------------------------------------

BRANCH = st.tuples(st.sampled_from(["conv", "input", "norm"]), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 4]))


@settings(max_examples=20)
@given(st.lists(BRANCH, min_size=1, max_size=4), st.integers(1, 2), st.booleans(), st.integers(0, 1))
def test_random_sums(branches: list[tuple[str, int, int]], stride: int, in_place: bool, lack: int) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList()
            for kind, kernel, groups in branches:
                part: nn.Module = nn.Identity()
                if kind == "conv":
                    padding = max(kernel // 2 - lack, 0) if kernel == 5 else kernel // 2
                    part = nn.Conv2d(4, 4, kernel, stride, padding, groups=groups, bias=kernel > 1)
                elif kind == "norm":
                    part = nn.BatchNorm2d(4)
                self.parts.append(part)

        def forward(self, x: Tensor) -> Tensor:
            total: Any = None
            for part in self.parts:
                y = part(x)
                if total is None or y.shape != total.shape:
                    total = y.tanh() if total is None and isinstance(part, nn.Identity) else y
                elif in_place:
                    total += y
                else:
                    total = total + y
            return total.sigmoid()

    model = Random().double().eval()
    trial = try_pass(MergeBranches(), model, torch.randn(2, 4, 9, 9, dtype=torch.float64))
    assert trial.difference() < 1e-9
    assert trial.again().unchanged
    assert trial.cost.macs <= trial.context.original.macs
    assert trial.cost.params <= trial.context.original.params

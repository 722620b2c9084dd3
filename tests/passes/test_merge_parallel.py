"""Check that maps of one input become one packed map that computes the same, and that split ones become whole again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import MergeParallel, SplitParallel
from graphopt.plan import Plan
from graphopt.rewrite import rewrite
from graphopt.testing import try_pass
from tests.small_models import attention, tokens

Forward = Callable[[Any, Tensor], Tensor]


class Several(nn.Module):
    """Linear layers of one input, put together as a function says."""

    def __init__(self, forward: Forward, *widths: int, bias: tuple[bool, ...] = (True, True, True)) -> None:
        super().__init__()
        for name, width, biased in zip("qkv", widths, bias, strict=False):
            setattr(self, name, nn.Linear(5, width, bias=biased))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def several(forward: Forward, *widths: int, **options: Any) -> Graph:
    torch.manual_seed(0)
    return capture(Several(forward, *widths, **options).eval(), torch.randn(2, 7, 5))


def gated(s: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(s.q(x)) * s.k(x)


# -- text -------------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial = try_pass(MergeParallel(), several(gated, 4, 4))
    assert trial.text().splitlines() == [
        "-%q_weight: float32[4, 5] = @q.weight",
        "-%q_bias: float32[4] = @q.bias",
        "-%k_weight: float32[4, 5] = @k.weight",
        "-%k_bias: float32[4] = @k.bias",
        "-%linear: float32[2?, 7, 4] = aten.linear.default(%x, %q_weight, %q_bias)",
        "-%sigmoid: float32[2?, 7, 4] = aten.sigmoid.default(%linear)",
        "-%linear_1: float32[2?, 7, 4] = aten.linear.default(%x, %k_weight, %k_bias)",
        "-%mul: float32[2?, 7, 4] = aten.mul.Tensor(%sigmoid, %linear_1)",
        "+%q_k_weight: float32[8, 5] = @q_k.weight",
        "+%q_k_bias: float32[8] = @q_k.bias",
        "+%linear_default: float32[2?, 7, 8] = aten.linear.default(%x, %q_k_weight, %q_k_bias)",
        "+%slice_tensor: float32[2?, 7, 4] = aten.slice.Tensor(%linear_default, 2, 0, 4)",
        "+%sigmoid: float32[2?, 7, 4] = aten.sigmoid.default(%slice_tensor)",
        "+%slice_tensor_1: float32[2?, 7, 4] = aten.slice.Tensor(%linear_default, 2, 4, 8)",
        "+%mul: float32[2?, 7, 4] = aten.mul.Tensor(%sigmoid, %slice_tensor_1)",
    ]
    (site,) = trial.applied
    assert (site.name, site.reason) == ("linear, linear_1", "merged the maps of x to 4, 4 features")
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    assert trial.again().unchanged
    assert trial.cost.macs == trial.context.original.macs
    assert trial.cost.params == trial.context.original.params


def test_refusals_have_reasons() -> None:
    def shared(s: Any, x: Tensor) -> Tensor:
        return gated(s, x) + s.q(x.exp())

    def computed(s: Any, x: Tensor) -> Tensor:
        return s.q(x) * nn.functional.linear(x, s.k.weight * 2)

    def far(s: Any, x: Tensor) -> Tensor:
        y = s.q(x)
        for _ in range(3):
            y = y @ y.transpose(1, 2) @ y
        return y * s.k(x)

    def written(s: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = s.q(x)
        return y * s.k(x.relu_())

    def reasons(forward: Forward, **options: Any) -> dict[str, str]:
        trial = try_pass(MergeParallel(**options), several(forward, 4, 4))
        assert trial.unchanged
        return {site.name: site.reason for site in trial.skipped}

    assert reasons(shared) == {
        "linear": "q.weight is shared: linear, linear_2 read it",
        "linear_1": "fewer than 2 near each other read x",
    }
    assert reasons(computed) == {
        "linear": "fewer than 2 near each other read x",
        "linear_1": "mul is computed, not a tensor of the model",
    }
    alone = dict.fromkeys(["linear", "linear_1"], "fewer than 2 near each other read x")
    assert reasons(far, reach=5) == alone
    assert reasons(gated, minimum=3) == {"linear, linear_1": "fewer than 3 near each other read x"}
    assert not reasons(written)  # the two read different values


# -- meaning ----------------------------------------------------------------------------------------------------------


def heads(s: Any, x: Tensor) -> Tensor:
    q, k, v = (y.view(x.shape[0], 7, 2, -1).transpose(1, 2) for y in (s.q(x), s.k(x), s.v(x)))
    return (q.tanh() @ k.transpose(-1, -2)) @ v


def strict_view(s: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(s.q(x).view(-1, 7 * 4)) * s.k(x).view(-1, 28) + s.v(x).view(-1, 2, 7)[:, 0].sum()


def written_into(s: Any, x: Tensor) -> Tensor:
    return s.q(x).sigmoid_() * s.k(x).tanh_() + s.v(x).mul_(2).sum()


@pytest.mark.parametrize("forward", [heads, strict_view, written_into], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3, (True, False, True)], ids=str)
def test_any_use_of_the_parts(forward: Forward, bias: tuple[bool, ...]) -> None:
    trial = try_pass(MergeParallel(), several(forward, 4, 4, 10, bias=bias))
    assert trial.applied
    assert trial.after.text().count("aten.linear") == 1
    assert trial.difference() < 1e-9
    assert trial.notices_damage()
    other = torch.randn(3, 7, 5)
    torch.testing.assert_close(trial.after.run(other), trial.before.run(other))


def test_convolutions_where_asked_for() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
            self.other, self.grouped = nn.Conv2d(3, 4, 3, padding=1, dilation=1, stride=2), nn.Conv2d(3, 3, 1, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.a(x).relu_(), self.b(x), self.grouped(x)], 1)
            return y.mean((2, 3)).sum(1) + self.other(x).sum((1, 2, 3))

    graph = capture(Inception().eval(), torch.randn(2, 3, 8, 9))
    left = try_pass(MergeParallel(), graph)
    assert left.unchanged
    assert {site.reason for site in left.skipped} == {
        "slices of a convolution's channels are copied (convolutions=false)"
    }
    trial = try_pass(MergeParallel(convolutions=True), graph)
    assert [site.facts["parts"] for site in trial.applied] == [[4, 6]]
    assert trial.difference() < 1e-9
    assert trial.notices_damage()


def test_the_packed_tensors_can_be_trained_as_the_parts_could() -> None:
    model = Several(gated, 4, 4)
    model.q.weight.requires_grad_(False)  # type: ignore[union-attr]
    trial = try_pass(MergeParallel(), model.eval(), torch.randn(2, 7, 5))
    assert trial.unchanged, "one of the weights is frozen, the other is not"
    trial = try_pass(MergeParallel(), several(gated, 4, 4).module, torch.randn(2, 7, 5))
    loss = trial.after.module.train()(torch.randn(2, 7, 5)).square().sum()
    loss.backward()
    assert all(tensor.grad is not None for tensor in trial.after.tensors().values())


# -- the way back -----------------------------------------------------------------------------------------------------


def test_split_parts_become_the_packed_tensors_again() -> None:
    split = try_pass(SplitParallel(), attention(), tokens())
    merged = try_pass(MergeParallel(), split.after)
    assert merged.after.tensors().keys() == split.before.tensors().keys()
    for name, tensor in merged.after.tensors().items():
        assert torch.equal(tensor, split.before.tensor(name))
        assert isinstance(tensor, nn.Parameter)
    assert merged.difference() < 1e-9


def test_split_parts_of_any_width_are_packed_and_plans_speak_of_the_input_model() -> None:
    split = try_pass(SplitParallel(), attention(), tokens())
    typing = infer(split.after)
    keep = {}
    for group in typing.groups:
        if group.role in ("v dim", "qk dim", "heads"):
            keep[group.atom] = np.array([0, 2, 3] if group.role == "v dim" else [1, 2])
    pruned = rewrite(typing, keep)
    plan = Plan.of(typing, keep)
    merged = try_pass(MergeParallel(), pruned)
    assert merged.difference() < 1e-9
    assert tuple(merged.after.tensor("qkv.weight").shape) == (2 * (2 + 2 + 3), 24)
    state = plan.apply(attention().state_dict())
    assert state["qkv.weight"].shape == merged.after.tensor("qkv.weight").shape
    again = infer(merged.after)
    (heads_left,) = [group for group in again.groups if group.role == "heads"]
    later = Plan.of(again, {heads_left.atom: np.array([1])})
    assert later.shape_after("qkv.weight") == (7, 24)
    assert plan.then(later).shape_after("qkv.weight") == (7, 24)


def test_a_plan_after_the_merge_speaks_of_the_tensors_before_it() -> None:
    summed = several(lambda s, x: (s.q(x) @ s.k(x).transpose(1, 2)) @ s.v(x).relu() @ x.new_ones(3, 1), 4, 4, 3)
    after = try_pass(MergeParallel(), summed).after
    typing = infer(after)
    (width,) = [g for g in typing.groups if g.size == 4]
    plan = Plan.of(typing, {width.atom: np.array([0, 3])})
    assert {name: dims[0].tolist() for name, dims in plan.keep.items()} == {
        name: [0, 3] for name in ("q.weight", "q.bias", "k.weight", "k.bias")
    }


# -- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 1)), min_size=1, max_size=5),
    st.integers(2, 3),
)
def test_random_sets_of_maps(maps: list[tuple[int, bool, int]], minimum: int) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(5, width, bias) for width, bias, _ in maps)

        def forward(self, x: Tensor) -> Tensor:
            inputs = [x, x.sigmoid()]
            return torch.cat(
                [each(inputs[which]).tanh() for each, (_, _, which) in zip(self.maps, maps, strict=True)], -1
            )

    trial = try_pass(MergeParallel(minimum=minimum), Random().eval(), torch.randn(2, 7, 5))
    assert trial.difference() < 1e-9
    assert trial.again().unchanged
    assert trial.cost.macs == trial.context.original.macs
    counts = [sum(which == number for _, _, which in maps) for number in (0, 1)]
    assert len(trial.applied) == sum(count >= minimum for count in counts)

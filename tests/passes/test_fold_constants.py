"""Check the pass that computes once what depends on no input."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor, nn
from torch.nn import functional

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.passes import FoldConstants
from graphopt.passes.canonicalize.fold_constants import GROWTH_LIMIT
from graphopt.testing import Trial, try_pass
from tests.random_graphs import Sample, samples
from tests.zoo.exactness import measure


class Attention(nn.Module):
    """Add a sine table to tokens, and a gathered bias to scores under a causal mask, as transformers do."""

    index: Tensor

    def __init__(self, width: int = 6, heads: int = 2, length: int = 4) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(7, heads))
        self.register_buffer("index", torch.arange(length)[:, None] - torch.arange(length)[None] + length - 1)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(self.length, dtype=x.dtype)[:, None] / torch.arange(1, 7, dtype=x.dtype)
        x = x + torch.sin(places)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        bias = self.bias[self.index.view(-1)].view(self.length, self.length, -1).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) + bias).masked_fill(~mask, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def inputs() -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attention(trainable: bool) -> Trial:
    return try_pass(FoldConstants(trainable), Attention().double().eval(), inputs())


def constants(done: Trial) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that were added."""
    before = done.before.tensors()
    return {name: tuple(tensor.shape) for name, tensor in done.after.tensors().items() if name not in before}


# -- text -----------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Add a standardised weight and a ramp; the ramp is stretched to what is not worth holding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.ones(1, 1, dtype=x.dtype).expand(1000, 1000).exp()
        return (
            functional.linear(x, self.weight - self.weight.mean(1, keepdim=True)) * torch.arange(2)
            + (x[:, :1, None] * wide).mean((1, 2))[:, None]
        )


def test_text() -> None:
    assert GROWTH_LIMIT < 1000 * 1000 * 8
    done = try_pass(FoldConstants(), Table(), torch.randn(3, 2, dtype=torch.float64))
    assert done.text().splitlines() == [
        "-%weight: float64[2, 2] = @weight",
        "-%ones: float64[1, 1] = aten.ones.default([1, 1], dtype=torch.float64, device=cpu, pin_memory=False)",
        "-%expand: float64[1000, 1000] = aten.expand.default(%ones, [1000, 1000])",
        "+%folded_ones: float64[1, 1] = @folded_ones",
        "+%expand: float64[1000, 1000] = aten.expand.default(%folded_ones, [1000, 1000])",
        "-%mean: float64[2, 1] = aten.mean.dim(%weight, [1], True)",
        "-%sub: float64[2, 2] = aten.sub.Tensor(%weight, %mean)",
        "-%linear: float64[3?, 2] = aten.linear.default(%x, %sub)",
        "-%arange: int64[2] = aten.arange.default(2, device=cpu, pin_memory=False)",
        "-%mul: float64[3?, 2] = aten.mul.Tensor(%linear, %arange)",
        "+%folded_sub: float64[2, 2] = @folded_sub",
        "+%linear: float64[3?, 2] = aten.linear.default(%x, %folded_sub)",
        "+%folded_arange: int64[2] = @folded_arange",
        "+%mul: float64[3?, 2] = aten.mul.Tensor(%linear, %folded_arange)",
    ]
    assert {site.name: site.reason for site in done.applied} == {
        "ones": "1 entry in place of 1 call",
        "sub": "4 entries in place of 2 calls",
        "arange": "2 entries in place of 1 call",
    }
    assert {site.name: site.reason for site in done.skipped} == {
        "exp": "8000000 bytes would be stored in place of the 0 that they are computed from",
        "expand": "8000000 bytes would be stored in place of the 0 that they are computed from",
    }
    assert done.difference() < 1e-12


# -- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (True, {"folded_sin": (4, 6), "index_view": (16,), "folded_bitwise_not": (4, 4)}),
        (False, {"folded_sin": (4, 6), "folded_permute_1": (2, 4, 4), "folded_bitwise_not": (4, 4)}),
    ],
)
def test_the_result_computes_the_same(trainable: bool, expected: dict[str, tuple[int, ...]]) -> None:
    done = attention(trainable)
    assert constants(done) == expected
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged
    assert ("bias" in dict(done.after.module.named_parameters())) == trainable


@pytest.mark.parametrize("trainable", [True, False])
def test_no_group_is_lost_and_all_are_still_exact(trainable: bool) -> None:
    done = attention(trainable)
    before, after = infer(done.before), infer(done.after)
    assert sorted(g.size for g in after.groups) == sorted(g.size for g in before.groups)
    found = measure(after)
    assert max(found.alone, found.together) < 1e-12


def test_a_trainable_model_learns_the_same() -> None:
    done = attention(trainable=True)
    gradients = []
    for graph in (done.before, done.after):
        module = graph.module.train()
        module.zero_grad()
        module(inputs()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 5
    assert all(torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_state_holds_what_is_made_of_the_state() -> None:
    class Two(nn.Module):
        kept: Tensor
        made: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.rand(3))
            self.register_buffer("made", torch.rand(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.kept.exp() + self.made.exp() + torch.arange(3)

    done = try_pass(FoldConstants(), Two(), torch.randn(2, 3))
    assert list(done.after.module.state_dict()) == ["folded_exp"]
    assert constants(done).keys() == {"folded_exp", "folded_exp_1", "folded_arange"}
    assert done.after.sources == {name: {} for name in constants(done)}


# -- what is not constant -------------------------------------------------------------------------------------------


def test_random_numbers_are_drawn_each_time() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(3).abs()

    done = try_pass(FoldConstants(), Noise(), torch.randn(2, 3))
    assert done.unchanged


class Cache(nn.Module):
    """Count calls, in a buffer of its own, and add a table that is written before it is read."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(2, 3)
        table[:, 1:] = torch.arange(2.0)
        table[0] += 5
        seen = self.steps * 2
        self.steps.add_(1.0)
        return x + seen + self.steps + table


def test_what_changes_from_call_to_call_is_not_folded() -> None:
    done = try_pass(FoldConstants(), Cache(), torch.randn(2, 3))
    assert done.difference() < 1e-12
    tables = constants(done)
    assert list(tables.values()) == [(2, 3)]
    assert not [node for node in done.after.nodes if "copy_" in str(node.target)]
    before, after = copy.deepcopy(done.before.module), copy.deepcopy(done.after.module)
    for _ in range(3):
        x = torch.randn(2, 3)
        assert torch.equal(before(x), after(x))
    assert done.again().unchanged


def test_a_value_that_is_read_between_two_writes_is_not_folded() -> None:
    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(3)
            table += 1
            y = x * table
            table += 1
            return y + table

    done = try_pass(FoldConstants(), Between(), torch.randn(2, 3))
    assert done.difference() < 1e-12


def test_what_training_changes_is_constant_in_deployment_only() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            assert self.norm.running_var is not None
            return self.norm(x) * self.norm.running_var.sqrt() + functional.dropout(torch.ones(3), 0.5, self.training)

    model = Scaled().eval()
    kept = try_pass(FoldConstants(trainable=True), model, torch.randn(4, 3))
    assert constants(kept).keys() == {"folded_ones"}
    done = try_pass(FoldConstants(), model, torch.randn(4, 3))
    assert constants(done).keys() == {"folded_sqrt", "folded_ones"}  # dropout draws
    assert done.difference() < 1e-12


def test_a_weight_is_not_stored_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(200, 100, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (
                functional.linear(x, self.weight) @ self.weight.flip(0)
                + functional.linear(x, self.weight.t().t())[:, :100]
            )

    done = try_pass(FoldConstants(), Tied(), torch.randn(2, 100, dtype=torch.float64))
    assert constants(done) == {"folded_flip": (200, 100)}
    assert {site.name: site.reason for site in done.skipped} == {
        "t_1": "160000 bytes of weight, which linear reads, too, would be stored twice",
        "t": "160000 bytes of weight, which linear reads, too, would be stored twice",
    }
    assert done.difference() < 1e-12


# -- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples())
def test_random_graphs_compute_the_same_and_lose_no_group(sample: Sample) -> None:
    note(repr(sample))
    graph = capture(sample.module.double().eval(), sample.inputs)
    for trainable in (True, False):
        done = try_pass(FoldConstants(trainable), graph)
        assert done.difference() < 1e-9
        assert done.again().unchanged
    kept = try_pass(FoldConstants(trainable=True), graph)
    assert len(infer(kept.after).groups) >= len(infer(graph).groups)

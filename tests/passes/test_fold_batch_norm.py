"""Check the pass that folds batch norms into layers: its text, its algebra, its refusals, what it says of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import FoldBatchNorm
from graphopt.plan import Plan
from graphopt.testing import Trial, try_pass
from tests.random_graphs import Sample, samples


def settled(model: nn.Module) -> nn.Module:
    """Give batch norms statistics, scales and shifts that are no constants, and the model float64."""
    generator = torch.Generator().manual_seed(0)
    for part in model.double().modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                if tensor is not None:
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data.copy_(noise + 0.5)
    return model.eval()


def images(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fold(model: nn.Module, inputs: Any = None) -> Trial:
    return try_pass(FoldBatchNorm(), settled(model), images() if inputs is None else inputs)


def norms(graph: Graph) -> int:
    return sum("batch_norm" in str(node.target) for node in graph.nodes)


# -- text -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Three batch norms: after a convolution, in front of a padded one, and in front of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.before, self.padded = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.last, self.a, self.b = nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.last(self.padded(self.before(x)).relu().mean((2, 3)))
        return self.a(x) * self.b(x)


def test_text() -> None:
    done = fold(Block())
    assert done.text().splitlines() == [
        "-%norm_weight: float64[3] = @norm.weight",
        "-%norm_bias: float64[3] = @norm.bias",
        "-%last_weight: float64[3] = @last.weight",
        "-%last_bias: float64[3] = @last.bias",
        "-%norm_running_mean: float64[3] = @norm.running_mean",
        "-%norm_running_var: float64[3] = @norm.running_var",
        "-%last_running_mean: float64[3] = @last.running_mean",
        "-%last_running_var: float64[3] = @last.running_var",
        "-%conv2d: float64[2?, 3, 4, 3] = aten.conv2d.default(%x, %conv_weight)",
        "-%batch_norm: float64[2?, 3, 4, 3] = aten.batch_norm.default(%conv2d, %norm_weight, %norm_bias, "
        "%norm_running_mean, %norm_running_var, False, 0.1, 1e-05, False)",
        "-%relu: float64[2?, 3, 4, 3] = aten.relu.default(%batch_norm)",
        "+%conv_bias: float64[3] = @conv.bias",
        "+%conv2d: float64[2?, 3, 4, 3] = aten.conv2d.default(%x, %conv_weight, bias=%conv_bias)",
        "+%relu: float64[2?, 3, 4, 3] = aten.relu.default(%conv2d)",
        "-%batch_norm_2: float64[2?, 3] = aten.batch_norm.default(%mean, %last_weight, %last_bias, "
        "%last_running_mean, %last_running_var, False, 0.1, 1e-05, False)",
        "-%linear: float64[2?, 2] = aten.linear.default(%batch_norm_2, %a_weight, %a_bias)",
        "-%linear_1: float64[2?, 2] = aten.linear.default(%batch_norm_2, %b_weight)",
        "+%linear: float64[2?, 2] = aten.linear.default(%mean, %a_weight, %a_bias)",
        "+%b_bias: float64[2] = @b.bias",
        "+%linear_1: float64[2?, 2] = aten.linear.default(%mean, %b_weight, bias=%b_bias)",
    ]
    assert [
        (site.name, site.reason, site.facts) for site in sorted(done.context.sites, key=lambda site: site.name)
    ] == [
        ("batch_norm", "into conv.weight, before it", {"module": "norm"}),
        (
            "batch_norm_1",
            "not before: relu (aten.relu.default) comes before it, no linear layer or convolution; not after: "
            "conv2d_1 pads with zeros, where the shift (up to 0.939) would be missing",
            {"module": "before"},
        ),
        ("batch_norm_2", "into a.weight, b.weight, after it", {"module": "last"}),
    ]
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged
    names = {name.rpartition(".")[0] for name in done.after.module.state_dict()}
    assert names == {"conv", "before", "padded", "a", "b"}
    assert done.after.module.meta["counters"] == {"before.num_batches_tracked": 1}
    done.after.module.train()(images())


# -- meaning --------------------------------------------------------------------------------------------------------


def sequence(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


LAYERS: dict[str, nn.Module] = {
    "convolution": sequence(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)),
    "grouped": sequence(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
    "depthwise": sequence(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    "named padding": sequence(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)),
    "transposed": sequence(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)),
    "transposed in groups": sequence(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)),
    "without scale and shift": sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)),
    "two in a row": sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
    "one dimension": sequence(nn.Flatten(2), nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)),
    "linear": sequence(nn.Flatten(), nn.Linear(120, 6), nn.BatchNorm1d(6)),
    "in front": sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)),
    "in front of one by one": sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)),
    "in front of a depthwise one": sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4, bias=False)),
    "in front of a linear one": sequence(nn.Flatten(), nn.BatchNorm1d(120), nn.Linear(120, 6)),
    "in front of two": sequence(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_result_computes_the_same(name: str) -> None:
    done = fold(LAYERS[name])
    assert norms(done.after) == 0
    assert done.difference() < 1e-12
    assert done.notices_damage()
    assert done.again().unchanged


class Tokens(nn.Module):
    """A linear layer over tokens, normalised by token channels as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 2)).reshape_as(y)


def test_a_layer_is_found_behind_a_reshape_that_leaves_channels_whole() -> None:
    done = fold(Tokens())
    assert norms(done.after) == 0
    assert done.difference() < 1e-12


def test_the_shift_is_exact_at_zero_padding_where_it_is_zero() -> None:
    model = settled(sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    norm = model[0]  # type: ignore[index]
    assert norm.running_var is not None
    with torch.no_grad():
        norm.bias.copy_(norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
        norm.running_mean.zero_()
        norm.bias.zero_()
    done = try_pass(FoldBatchNorm(), model, images())
    assert norms(done.after) == 0
    assert done.difference() < 1e-12


# -- refusals -------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y).relu()


class Shared(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x).relu()))


class Computed(Branches):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight - self.conv.weight.mean()
        return self.norm(nn.functional.conv2d(x, weight))


class Channels(nn.Module):
    """A batch norm over tokens' places, not over the layer's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 8), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "read by others": (Branches(), "not before: conv2d has 2 readers (batch_norm, add)"),
    "shared": (Shared(), "not before: conv.weight is shared: conv2d, conv2d_1 read it"),
    "computed": (Computed(), "not before: sub is computed, not a tensor of the model"),
    "another dimension": (
        Channels(),
        "not before: dimension 1 of linear is mapped, whose channels are in dimension 3",
    ),
    "batch statistics": (
        sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)),
        "it normalises by its batches in evaluation, too",
    ),
    "groups": (
        sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, groups=2)),
        "not before: input_1 (input) comes before it",
    ),
    "transposed": (sequence(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2)), "not before: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_reasons(name: str) -> None:
    model, reason = REFUSED[name]
    done = fold(model)
    (site,) = done.skipped
    assert site.reason.startswith(reason)
    assert done.unchanged
    if name == "groups":
        assert site.reason.endswith("conv2d is transposed, or has groups of several channels")


def test_training_mode_does_not_matter_and_the_norm_is_gone() -> None:
    model = settled(sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    graph = capture(model, images())
    done = try_pass(FoldBatchNorm(), graph)
    done.after.module.train()
    assert torch.allclose(done.after.module(images()), graph.run(images()))


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_of_the_graph_before_are_not_touched_and_stay_parameters() -> None:
    model = settled(sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    graph = capture(model, images())
    before = {name: tensor.clone() for name, tensor in graph.tensors().items()}
    done = try_pass(FoldBatchNorm(), graph)
    assert all(torch.equal(graph.tensor(name), value) for name, value in before.items())
    found = dict(done.after.module.named_parameters())
    assert {name: tensor.requires_grad for name, tensor in found.items()} == {"0.weight": False, "0.bias": True}


def test_plans_go_on_speaking_of_the_batch_norm() -> None:
    model = settled(sequence(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)))
    plans = []
    graph = capture(model, images())
    for each in (graph, try_pass(FoldBatchNorm(), graph).after):
        typing = infer(each)
        (group,) = typing.groups
        plans.append(Plan.of(typing, {group.atom: np.array([0, 2, 5])}))
    assert plans[0] == plans[1]
    assert plans[0].keep.keys() == {
        "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight",
    }  # fmt: skip


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples())
def test_random_graphs_compute_the_same(sample: Sample) -> None:
    note(repr(sample))
    graph = capture(settled(sample.module), sample.inputs)
    done = try_pass(FoldBatchNorm(), graph)
    assert done.difference() < 1e-9
    assert done.again().unchanged

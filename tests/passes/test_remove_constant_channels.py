"""Check the pass that removes channels which are constant or unread: exactly, and only where that is proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.passes import RemoveConstantChannels
from graphopt.passes.prune.constancy import constancy
from graphopt.pipeline import Pipeline, run
from graphopt.pipeline.base import Context
from graphopt.testing import Trial, try_pass
from graphopt.verify import difference, evaluate
from tests.random_graphs import Sample, samples


class Net(nn.Module):
    """Convolution, batch norm, activation, convolution, and a head that reads a flattened image."""

    def __init__(self, padding: int = 0, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=padding, bias=False)
        self.head = nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = functional.adaptive_avg_pool2d(torch.tanh(self.second(x)), 3)
        return self.head(x.flatten(1))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(gamma_zero: dict[int, float], **options: Any) -> Net:
    """Return one whose batch norm has scale 0 at these channels, and there these shifts."""
    torch.manual_seed(0)
    model = Net(**options).double().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.rand(6) + 0.5)
        model.norm.bias.copy_(torch.rand(6) + 0.5)
        for index, shift in gamma_zero.items():
            model.norm.weight[index], model.norm.bias[index] = 0.0, shift
    return model


def moved(trial: Trial) -> float:
    """Return how far the outputs are from those of the model before, itself, not masked."""
    args, kwargs = trial.before.example_inputs
    before, after = (evaluate(graph, args, kwargs) for graph in (trial.before, trial.after))
    return difference(before, after, double=True).relative


def kept(trial: Trial) -> dict[str, list[int]]:
    removal = trial.result.removal
    if removal is None:
        return {}
    names = {group.atom: group.name for group in removal.typing.groups}
    return {names[atom]: indices.tolist() for atom, indices in removal.keep.items()}


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    trial = try_pass(RemoveConstantChannels(), net({1: 0.7, 4: 0.0}), images())
    lines = [line for line in trial.text().splitlines() if "batch_norm" not in line and "relu.d" not in line]
    assert lines == TEXT
    (site,) = trial.applied
    assert (site.name, site.reason) == ("first.weight[0]", "kept 4 of 6 indices")
    assert (site.facts["size"], site.facts["kept"], site.facts["constant"]) == (6, 4, 1)
    assert kept(trial) == {"first.weight[0]": [0, 2, 3, 5]}
    assert trial.after.tensor("second.bias").shape == (5,)
    expected = 0.7 * trial.before.tensor("second.weight")[:, 1].sum((1, 2))
    assert torch.allclose(trial.after.tensor("second.bias"), expected)
    assert trial.difference() < 1e-12
    assert moved(trial) < 1e-12
    assert trial.notices_damage()
    assert trial.again().unchanged


TEXT = [
    "-%first_weight: float64[6, 3, 3, 3] = @first.weight",
    "-%norm_weight: float64[6] = @norm.weight",
    "-%norm_bias: float64[6] = @norm.bias",
    "-%second_weight: float64[5, 6, 3, 3] = @second.weight",
    "+%first_weight: float64[4, 3, 3, 3] = @first.weight",
    "+%norm_weight: float64[4] = @norm.weight",
    "+%norm_bias: float64[4] = @norm.bias",
    "+%second_weight: float64[5, 4, 3, 3] = @second.weight",
    "-%norm_running_mean: float64[6] = @norm.running_mean",
    "-%norm_running_var: float64[6] = @norm.running_var",
    "-%conv2d: float64[2?, 6, 6, 6] = aten.conv2d.default(%x, %first_weight)",
    "-%conv2d_1: float64[2?, 5, 4, 4] = aten.conv2d.default(%relu, %second_weight)",
    "+%norm_running_mean: float64[4] = @norm.running_mean",
    "+%norm_running_var: float64[4] = @norm.running_var",
    "+%conv2d: float64[2?, 4, 6, 6] = aten.conv2d.default(%x, %first_weight)",
    "+%second_bias: float64[5] = @second.bias",
    "+%conv2d_1: float64[2?, 5, 4, 4] = aten.conv2d.default(%relu, %second_weight, bias=%second_bias)",
]


def test_zero_padding_is_where_a_constant_would_be_missing() -> None:
    trial = try_pass(RemoveConstantChannels(), net({1: 0.7}, padding=1), images())
    assert trial.unchanged
    (site,) = trial.skipped
    assert site.name == "first.weight[0]"
    assert site.reason == "conv2d_1 reads it beside zero padding, where its constant (up to 0.7) would be missing"


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_of_zero_leave_every_other_number_alone(padding: int) -> None:
    trial = try_pass(RemoveConstantChannels(), net({4: 0.0, 5: -0.3}, padding=padding), images())
    assert kept(trial) == {"first.weight[0]": [0, 1, 2, 3]}
    assert trial.before.tensors().keys() == trial.after.tensors().keys()
    for name, tensor in trial.after.tensors().items():
        sliced = trial.before.tensor(name)[tuple(slice(size) for size in tensor.shape)]
        assert torch.equal(tensor, sliced)
    assert moved(trial) < 1e-15


class Gain(nn.Module):
    """Multiply by one number that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.gain


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "in place": lambda x: functional.relu(x, inplace=True),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
    "chain": lambda x: functional.max_pool2d(functional.dropout(2 * torch.tanh(x) - 0.3, 0.1, False), 1) * x,
    "moved and back": lambda x: x.permute(0, 2, 3, 1).clamp(-1, 1).permute(0, 3, 1, 2),
    "scaled by one parameter": Gain(),
    "gated by itself": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "split and joined": lambda x: torch.cat([part.exp() for part in x.chunk(2, 1)], 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_constants_are_followed_through_what_keeps_channels_apart(name: str) -> None:
    trial = try_pass(RemoveConstantChannels(), net({0: 0.4, 3: -0.8, 5: 1.5}, activation=ACTIVATIONS[name]), images())
    removed = sum(site.facts["size"] - site.facts["kept"] for site in trial.applied)
    assert removed == 3
    assert moved(trial) < 1e-12
    assert trial.difference() < 1e-12
    assert trial.again().unchanged


def test_rows_of_zeros_are_their_bias_and_columns_of_zeros_are_not_read() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    layers: list[Any] = list(model)
    with torch.no_grad():
        layers[0].weight[2] = 0.0  # constant, gelu(bias)
        layers[2].weight[:, 4] = 0.0  # nobody reads hidden channel 4
        layers[4].weight[:, 1] = 0.0  # nor channel 1 of the second layer,
        layers[2].weight[0, 5] = layers[2].weight[2:, 5] = 0.0  # which alone reads hidden channel 5
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 4, dtype=torch.float64))
    assert kept(trial) == {"0.weight[0]": [0, 1, 3], "2.weight[0]": [0, 2, 3, 4]}
    assert moved(trial) < 1e-12
    assert trial.again().unchanged


def test_residual_streams_lose_what_all_of_their_layers_leave_constant() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + torch.relu(self.b(x)))

    model = Residual().double()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[3] = 0.0
        model.a.weight[1] = 0.0
        model.b.bias[3] = 0.25
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 4, dtype=torch.float64))
    assert kept(trial) == {"a.weight[0]": [0, 1, 2, 4]}
    assert moved(trial) < 1e-12


def test_grouped_and_depthwise_convolutions() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.depth, self.grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.grouped(torch.relu(self.depth(torch.relu(self.norm(self.first(x))))))

    model = Grouped().double().eval()
    with torch.no_grad():
        model.norm.bias.add_(0.5)
        model.norm.weight[[1, 3, 5]] = 0.0  # 1 and 5 are the second of either group; 3 has no partner
    trial = try_pass(RemoveConstantChannels(), model, images())
    assert trial.applied
    assert moved(trial) < 1e-12
    assert trial.difference() < 1e-12
    assert trial.again().unchanged


# -- refusals -------------------------------------------------------------------------------------------------------


def test_shared_parameters_are_not_changed_for_one_reader() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x))) + self.c(torch.relu(self.b(x)))

    model = Shared().double()
    with torch.no_grad():
        model.a.weight[1], model.b.weight[1] = 0.0, 0.0
        model.a.bias[1] = model.b.bias[1] = 0.5
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 4, dtype=torch.float64))
    assert trial.unchanged
    assert [site.reason for site in trial.skipped] == ["c.weight is shared: linear_1, linear_3 read it"]
    with torch.no_grad():
        model.a.bias[1] = model.b.bias[1] = -0.5  # zero behind the activation: nothing has to move
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 4, dtype=torch.float64))
    assert kept(trial) == {"a.weight[0]": [0, 2, 3, 4]}
    assert moved(trial) < 1e-12


def test_groups_that_are_normalised_or_mixed_stay() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 6)
            self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)))

    model = Mixed().double()
    with torch.no_grad():
        for layer in (model.q, model.v):
            layer.weight[0], layer.bias[0] = 0.0, 0.0
        model.norm.weight[1] = 0.0
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 7, 4, dtype=torch.float64))
    assert trial.unchanged
    assert {site.name: site.reason for site in trial.skipped} == {
        "q.weight[0]": "matmul (aten.matmul.default) mixes its indices",
        "v.weight[0]": "1 operator normalise over it (layer_norm)",
    }


def test_counts_stay_multiples_of_what_the_target_computes_in() -> None:
    trial = try_pass(RemoveConstantChannels(), net({1: 0.7, 4: 0.0, 5: 0.1}), images(), channel_multiple=2)
    assert kept(trial) == {"first.weight[0]": [0, 1, 2, 3]}
    assert moved(trial) < 1e-12
    trial = try_pass(RemoveConstantChannels(), net({1: 0.7}), images(), channel_multiple=4)
    assert trial.unchanged


def test_one_index_stays() -> None:
    trial = try_pass(RemoveConstantChannels(), net(dict.fromkeys(range(6), 0.2)), images())
    sizes = {site.name: site.facts["kept"] for site in trial.applied}
    assert sizes["first.weight[0]"] == 1
    assert moved(trial) < 1e-12
    assert trial.again().unchanged


def test_a_value_that_is_written_into_later_is_not_taken_for_constant() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = y.view(-1)
            z.add_(x.sum())
            return self.b(y)

    model = Late().double()
    with torch.no_grad():
        model.a.weight[1] = 0.0
    trial = try_pass(RemoveConstantChannels(), model, torch.randn(3, 4, dtype=torch.float64))
    assert moved(trial) < 1e-12


# -- the analysis -----------------------------------------------------------------------------------------------------


def check_constancy(graph: Graph) -> int:
    """Compare what is said to be constant with what the graph computes on two inputs; return how much was said."""
    args, kwargs = graph.example_inputs

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n] = result.clone()
            return result

    said = 0
    for scale in (1.0, 3.0):
        seen: dict[torch.fx.Node, Tensor] = {}
        inputs = [
            scale * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in (*args, *kwargs.values())
        ]
        with torch.no_grad():
            Recorder(graph.module, garbage_collect_values=False).run(*inputs, enable_io_processing=False)
        for node, dims in constancy(graph).items():
            for dim, channels in dims.items():
                if node not in seen or node.op != "call_function":
                    continue
                indices = torch.from_numpy(np.flatnonzero(channels.known))
                found = seen[node].movedim(dim, 0)[indices].flatten(1)
                wanted = torch.from_numpy(channels.value)[indices, None].to(found)
                assert torch.allclose(found, wanted.expand_as(found), rtol=1e-9, atol=1e-12), (node, dim)
                said += len(indices)
    return said


def silence(module: nn.Module, seed: int) -> nn.Module:
    """Put zeros in some rows, columns and scales of a module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.double().eval().modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() >= 1:
                weight[torch.rand(len(weight), generator=generator) < 0.3] = 0.0
                if weight.dim() >= 2:
                    weight[:, torch.rand(weight.shape[1], generator=generator) < 0.2] = 0.0
    return module


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=15)
@given(samples(), st.integers(0, 99))
def test_random_graphs_keep_their_outputs(sample: Sample, seed: int) -> None:
    note(repr(sample))
    graph = capture(silence(sample.module, seed), sample.inputs)
    check_constancy(graph)
    trial = try_pass(RemoveConstantChannels(), graph)
    assert trial.difference() < 1e-9
    assert moved(trial) < 1e-9
    assert trial.again().unchanged


def test_the_analysis_says_something() -> None:
    for name, activation in ACTIVATIONS.items():
        graph = capture(net({0: 0.4, 3: -0.8}, activation=activation), images())
        assert check_constancy(graph) >= 8, name


def test_a_pipeline_checks_it_and_plans_what_is_gone() -> None:
    graph = capture(net({1: 0.7, 4: 0.0}), images())
    context = Context(original=CostModel(infer(graph)).cost())
    outcome = run(
        Pipeline.parse("remove-constant-channels"), graph, context, inputs=[("example", graph.example_inputs)]
    )
    assert outcome.plan.keep["norm.weight"][0].tolist() == [0, 2, 3, 5]
    assert all(comparison.passed for comparison in outcome.records[0].comparisons)

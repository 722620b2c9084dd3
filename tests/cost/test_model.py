"""The cost model against torch's own counter, before and after pruning."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.groups import Group
from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects.aten import infer
from graphopt.rewrite import rewrite
from tests.zoo.captured import MODELS, captured


class Residual(nn.Module):
    """Convolutions with a residual, a grouped one, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 20, 1)
        self.grouped = nn.Conv2d(20, 20, 3, padding=1, groups=5)
        self.outer = nn.Conv2d(20, 12, 1)
        self.classifier = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.outer(torch.relu(self.grouped(self.inner(x)))) + x
        result: Tensor = self.classifier(torch.cat([x, y], 1).mean((2, 3)))
        return result


class Attention(nn.Module):
    """One block of a transformer, with packed q, k and v."""

    def __init__(self, heads: int = 3, dim: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(24, 3 * heads * dim)
        self.proj = nn.Linear(heads * dim, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + self.proj(y)
        result: Tensor = x + self.mlp(x)
        return result


class Tied(nn.Module):
    """An embedding whose weight is also the classifier's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.inner(self.embed(x)))
        return result


SMALL = {
    "residual": (Residual().eval(), (torch.randn(2, 3, 8, 10),)),
    "attention": (Attention().eval(), (torch.randn(2, 5, 24),)),
    "tied": (Tied().eval(), (torch.randint(11, (2, 4)),)),
}


def counted_flops(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Count with torch, which lacks a formula for the CPU's fused attention and for experts' matrices in one operator.

    The plain form of attention has one. The counter trips over parameters that enter a module without gradients
    being recorded, so none is asked for.
    """
    formulas: dict[Any, Any] = {}
    with suppress(AttributeError):
        formulas[torch.ops.transformers.grouped_mm_fallback] = grouped_flops
    module.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops())


def grouped_flops(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Every row is multiplied with the matrix of its expert."""
    return 2 * rows[0] * weights[1] * weights[2]


def some_kept(groups: Iterable[Group]) -> dict[Atom, Indices]:
    """Keep an uneven share of every group, another in each."""
    rng = np.random.default_rng(0)
    kept = {}
    for group in groups:
        count = max(1, int(group.size * rng.uniform(0.3, 0.9)))
        kept[group.atom] = np.sort(rng.choice(group.size, count, replace=False)).astype(np.int64)
    return kept


@pytest.mark.parametrize("name", SMALL)
def test_flops_equal_those_that_torch_counts(name: str) -> None:
    module, args = SMALL[name]
    typing = infer(capture(module, args))
    model = CostModel(typing)
    assert model.cost().flops == counted_flops(module, args, {}) > 0
    kept = some_kept(typing.groups)
    pruned = rewrite(typing, kept)
    cost = model.cost(model.sizes(kept))
    assert cost.flops == counted_flops(pruned.module, args, {}) < model.cost().flops
    assert cost == CostModel(infer(pruned)).cost()


@pytest.mark.zoo
@pytest.mark.parametrize("name", MODELS)
def test_zoo_flops_agree_with_torch(name: str) -> None:
    _, typing = captured(name)
    args, kwargs = typing.graph.example_inputs
    model = CostModel(typing)
    # Export leaves out what no output depends on, so the graph is run and not the module it was made of.
    assert model.cost().flops == pytest.approx(counted_flops(typing.graph.module, args, kwargs), rel=1e-3)
    kept = some_kept(typing.groups)
    pruned = rewrite(typing, kept)
    cost = model.cost(model.sizes(kept))
    assert cost.flops == pytest.approx(counted_flops(pruned.module, args, kwargs), rel=1e-3)
    tensors = pruned.tensors()
    assert cost.params == sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    assert cost.weight_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", SMALL)
def test_parameters_and_weight_bytes_are_those_of_the_module(name: str) -> None:
    module, args = SMALL[name]
    cost = CostModel(infer(capture(module, args))).cost()
    read = [b for n, b in module.named_buffers() if "num_batches_tracked" not in n]
    assert cost.params == sum(p.numel() for p in module.parameters())
    assert cost.weight_bytes == sum(t.numel() * t.element_size() for t in [*module.parameters(), *read])


def test_a_shared_parameter_counts_once() -> None:
    module, args = SMALL["tied"]
    assert CostModel(infer(capture(module, args))).cost().params == 11 * 6 + 6 * 6


class Chain(nn.Module):
    """Three linear layers: at most two results live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 50), nn.Linear(50, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu_(self.b(self.a(x))))
        return result


def test_activations_are_counted_as_they_are_allocated_and_freed() -> None:
    model = CostModel(infer(capture(Chain(), (torch.randn(2, 3),))))
    cost = model.cost()
    assert cost.activation_bytes == 2 * (50 + 40 + 5) * 4
    assert cost.peak_activation_bytes == 2 * (50 + 40) * 4
    assert cost.memory == cost.weight_bytes + cost.peak_activation_bytes
    assert model.memory(model.full) == cost.memory
    small = model.cost([2, 40] if model.groups[0].size == 50 else [40, 2])
    assert small.peak_activation_bytes == 2 * (40 + 5) * 4


def test_activation_bytes_hold_for_the_captured_batch() -> None:
    once = CostModel(infer(capture(Chain(), (torch.randn(2, 3),)))).cost()
    twice = CostModel(infer(capture(Chain(), (torch.randn(4, 3),)))).cost()
    assert twice.activation_bytes == 2 * once.activation_bytes
    assert twice.macs == 2 * once.macs
    assert twice.params == once.params


def test_layers_add_up_to_the_totals() -> None:
    module, args = SMALL["residual"]
    model = CostModel(infer(capture(module, args)))
    cost, layers = model.cost(), {layer.name: layer for layer in model.layers()}
    for quantity in ("macs", "params", "weight_bytes", "activation_bytes"):
        assert sum(getattr(layer, quantity) for layer in layers.values()) == getattr(cost, quantity)
    assert layers["grouped"].macs == 2 * 80 * 20 * 4 * 9
    assert layers["grouped"].params == 20 * 4 * 9 + 20
    assert layers["norm"].weight_bytes == 4 * 12 * 4
    assert layers["classifier"].activation_bytes == 2 * 7 * 4


def test_removing_an_index_saves_what_the_marginal_cost_says() -> None:
    module, args = SMALL["residual"]
    typing = infer(capture(module, args))
    model = CostModel(typing)
    saved = model.flops.changes(model.full, -1)
    for i, group in enumerate(model.groups):
        pruned = rewrite(typing, {group.atom: np.arange(group.size - 1)})
        assert model.flops(model.full) + saved[i] == counted_flops(pruned.module, args, {})


def test_costs_by_tensor_and_node_are_those_of_the_graph() -> None:
    module, args = SMALL["residual"]
    graph = capture(module, args)
    model = CostModel(infer(graph))
    assert model.elements_by_tensor() == {name: t.numel() for name, t in graph.tensors().items()}
    for node, size in model.bytes_by_node().items():
        tensors = [spec for spec in tree_leaves(node.meta["spec"]) if hasattr(spec, "dtype")]
        assert size == sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in tensors)


def test_numbers_are_reported_by_name() -> None:
    module, args = SMALL["residual"]
    cost = CostModel(infer(capture(module, args))).cost()
    assert cost.to_dict()["flops"] == 2 * cost.macs
    assert cost.to_dict()["memory"] == cost.memory

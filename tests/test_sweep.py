"""Check the interpreter that walks all batches at once: what it computes, shows, fetches, lets go and leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import PassError, PipelineError
from graphopt.graph import Call, Graph
from graphopt.rewrite import rewrite
from graphopt.sweep import Inputs, Sweep, lockstep
from tests.random_graphs import Sample, samples
from tests.small_models import attention, convolutions, images, tokens

aten = torch.ops.aten


def calls(*inputs: Tensor) -> list[Inputs]:
    return [((x,), {}) for x in inputs]


def outputs(sweep: Sweep) -> list[Any]:
    """Walk to the end; return what the model returns for each batch."""
    found: list[Any] = []
    for node in sweep:
        if node.op == "output":
            found = [args[0] for args, _ in sweep.operands(node)]
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (convolutions, images),
    "attention": (attention, tokens),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_batch_is_computed_as_the_module_does(name: str) -> None:
    model, inputs = MODELS[name]
    graph = capture(model(), inputs(2))
    batches = [inputs(2), inputs(3) + 1, inputs(5) * 2]
    for x, found in zip(batches, outputs(Sweep(graph, calls(*batches))), strict=True):
        assert torch.equal(found[0] if isinstance(found, tuple) else found, graph.run(x))


def test_double_computes_in_float64() -> None:
    graph = capture(attention(), tokens())
    (found,) = outputs(Sweep(graph, calls(tokens()), double=True))
    expected = capture(attention_like(graph).double(), tokens().double()).run(tokens().double())
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    assert torch.get_default_dtype() == torch.float32


def attention_like(graph: Graph) -> nn.Module:
    model = attention()
    model.load_state_dict(graph.module.state_dict())
    return model


def test_operands_are_seen_before_the_node_runs() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(2, 3), torch.randn(5, 3)]
    sweep = Sweep(capture(model, batches[0]), calls(*batches))
    seen: dict[str, list[Tensor]] = {}
    for node in sweep:
        if node.target is aten.linear.default:
            seen[node.name] = [value.clone() for value in sweep.values(Call(node)["input"])]
            assert [len(args) for args, _ in sweep.operands(node)] == [3, 3]
    with torch.no_grad():
        assert all(map(torch.equal, seen["linear"], batches))
        assert all(torch.equal(a, model[:2](b)) for a, b in zip(seen["linear_1"], batches, strict=True))


def test_results_are_there_at_once_and_computed_once() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    sweep = Sweep(graph, calls(torch.randn(2, 3)))
    early: list[Tensor] = []
    for node in sweep:
        if node.target is aten.linear.default:
            early = sweep.results(node)
        elif node.target is aten.relu.default:
            assert next(sweep.values(node.args[0])) is early[0]


# -- what it holds --------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Reads one weight twice, transposed the second time, and another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.middle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.middle(torch.relu(x @ self.weight))) @ self.weight.t()


def test_tensors_are_fetched_at_first_use_and_dropped_after_the_last() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Shared(), nn.Linear(4, 2))
    graph = capture(model, torch.randn(2, 3))
    memory: dict[str, weakref.ref[Any]] = {}

    def fetch(name: str) -> Tensor:
        array = graph.tensor(name).detach().numpy().copy()
        memory[name] = weakref.ref(array)  # lives as long as a tensor that shares its memory
        return torch.from_numpy(array)

    sweep = Sweep(graph, calls(torch.randn(2, 3), torch.randn(4, 3)), tensor=fetch)
    alive = [(node.name, [name for name, array in memory.items() if array() is not None]) for node in sweep]
    assert alive == [
        ("linear", []),
        ("relu", []),
        ("matmul", []),
        ("relu_1", ["2.weight"]),
        ("linear_1", ["2.weight"]),
        ("relu_2", ["2.weight"]),
        ("t", ["2.weight"]),
        ("matmul_1", ["2.weight"]),
        ("linear_2", []),
        ("output", []),
    ]
    assert memory.keys() == {"0.weight", "0.bias", "2.weight", "2.middle.weight", "2.middle.bias", "3.weight", "3.bias"}


def test_a_tensor_with_several_readers_is_fetched_once() -> None:
    graph = capture(Shared(), torch.randn(2, 4))
    log: list[str] = []

    def fetch(name: str) -> Tensor:
        log.append(name)
        return graph.tensor(name)

    outputs(Sweep(graph, calls(torch.randn(2, 4), torch.randn(2, 4)), tensor=fetch))
    assert sorted(log) == ["middle.bias", "middle.weight", "weight"]


def test_values_end_with_their_last_reader() -> None:
    graph = capture(nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)]), torch.randn(2, 4))
    sweep = Sweep(graph, calls(torch.randn(2, 4)))
    alive: list[weakref.ref[Tensor]] = []
    for node in sweep:
        if node.op == "call_function":
            alive.append(weakref.ref(next(sweep.values(node.args[0]))))
            assert sum(each() is not None for each in alive) <= 1 + (node.target is aten.linear.default)
    assert sweep.batch_count == 0
    assert not any(each() is not None for each in alive)


# -- replacing ------------------------------------------------------------------------------------------------------


def test_a_replaced_tensor_counts_from_the_current_node_on() -> None:
    model, x = Shared(), torch.randn(3, 4)
    graph = capture(model, x)
    new = torch.randn(4, 4)
    sweep = Sweep(graph, calls(x))
    found: list[Any] = []
    for node in sweep:
        if node.name == "matmul_1":
            sweep.results(node)  # what was computed with the old value is forgotten
            sweep.replace("weight", new)
        if node.op == "output":
            found = [args[0] for args, _ in sweep.operands(node)]
    with torch.no_grad():
        hidden = torch.relu(model.middle(torch.relu(x @ model.weight)))
        torch.testing.assert_close(found[0][0], hidden @ new.t())
    torch.testing.assert_close(outputs(Sweep(graph, calls(x)))[0][0], graph.run(x))


# -- what it leaves alone -------------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Writes into its input, and into a buffer of its own, of which a view is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 4))
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        cache = self.get_buffer("cache").clone().view(8)[:4]
        cache.add_(x.sum(0))
        return cache * self.scale.exp()


def test_inputs_and_buffers_are_not_written_into() -> None:
    model, x, y = Writes(), torch.randn(3, 4), torch.randn(5, 4)
    graph = capture(model, x.clone())
    first, second = x.clone(), y.clone()
    a, b = outputs(Sweep(graph, calls(first, second)))
    assert torch.equal(first, x)
    assert torch.equal(second, y)
    torch.testing.assert_close(a[0], model(x.clone()).detach())
    torch.testing.assert_close(b[0], model(y.clone()).detach())


def test_what_follows_from_tensors_alone_is_computed_once() -> None:
    model, x = Writes(), torch.randn(3, 4)
    sweep = Sweep(graph := capture(model, x.clone()), calls(x, x))
    constant = {node.name for node in sweep if node.op == "call_function" and sweep.is_constant(node)}
    assert constant == {"exp"}, graph.text()


def test_a_module_left_in_training_is_run_in_evaluation_mode() -> None:
    graph = capture(convolutions(), images())
    expected = graph.run(images())
    graph.module.train()
    (found,) = outputs(Sweep(graph, calls(images())))
    assert torch.equal(found[0], expected)
    assert all(int(t) == 1 for n, t in graph.module.named_buffers() if n.endswith("num_batches_tracked"))


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_named() -> None:
    graph = capture(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(
        PipelineError, match=r"batch 1 of the calibration data does not fit .* static|batch 1 .* size 3"
    ):
        outputs(Sweep(graph, calls(torch.randn(2, 3), torch.randn(2, 5))))
    with pytest.raises(PipelineError, match=r"batch 0 of the calibration data does not fit the model"):
        outputs(Sweep(graph, [((), {})]))


def test_a_node_that_breaks_off_is_named() -> None:
    graph = capture(nn.Embedding(3, 4), torch.tensor([0, 1]))
    with pytest.raises(PassError, match=r"on batch 0 of the calibration data broke off at embedding .*IndexError"):
        outputs(Sweep(graph, calls(torch.tensor([7, 1]))))


# -- two graphs -----------------------------------------------------------------------------------------------------


def halved(graph: Graph) -> Graph:
    typing = infer(graph)
    return rewrite(typing, {g.atom: np.arange(0, g.size, 2) for g in typing.groups if not g.normalised})


def test_two_graphs_walk_in_lockstep() -> None:
    dense = capture(attention(), tokens())
    small = halved(dense)
    left, right = Sweep(dense, calls(tokens(), tokens(3))), Sweep(small, calls(tokens(), tokens(3)))
    pairs: list[tuple[fx.Node | None, fx.Node | None]] = []
    sizes: dict[str, tuple[int, int]] = {}
    for a, b in lockstep(left, right):
        pairs.append((a, b))
        assert a is not None
        assert b is not None
        if a.target is aten.linear.default:
            x, y = next(left.values(Call(a)["input"])), next(right.values(Call(b)["input"]))
            sizes[a.name] = (x.shape[-1], y.shape[-1])
    assert [(a.name, b.name) for a, b in pairs if a and b] == [
        (n.name, n.name) for n in dense.nodes if n.op in ("call_function", "output")
    ]
    assert sizes["linear_3"] == (24, 24)
    assert sizes["linear_4"] == (40, 20)


def test_nodes_of_one_graph_only_have_no_partner() -> None:
    first = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    second = first.clone()
    relu = next(n for n in second.nodes if n.name == "relu")
    with second.module.graph.inserting_after(relu):
        extra = second.module.graph.create_node("call_function", aten.neg.default, (relu,), name="neg")
    relu.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)
    x = torch.randn(2, 3)
    for one, other, expected in ((first, second, (None, "neg")), (second, first, ("neg", None))):
        pairs = [(a and a.name, b and b.name) for a, b in lockstep(Sweep(one, calls(x)), Sweep(other, calls(x)))]
        assert [p for p in pairs if None in p] == [expected]
        assert len(pairs) == 5


def test_graphs_in_different_order_are_refused() -> None:
    first = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    second = first.clone()
    for node in second.nodes:
        if node.op == "call_function":
            node.name = {"linear": "relu", "relu": "linear"}[node.name]
    with pytest.raises(PassError, match="one runs linear where the other runs relu"):
        list(lockstep(Sweep(first, calls(torch.randn(2, 3))), Sweep(second, calls(torch.randn(2, 3)))))


@settings(max_examples=10)
@given(samples())
def test_any_graph_is_computed_as_its_module_does(sample: Sample) -> None:
    module = sample.module.double().eval()
    graph = capture(module, sample.inputs)
    found = outputs(Sweep(graph, [(sample.inputs, {}), (sample.other, {})]))
    for inputs, each in zip((sample.inputs, sample.other), found, strict=True):
        for a, b in zip(pytree.tree_leaves(each), pytree.tree_leaves(graph.run(*inputs)), strict=True):
            assert torch.equal(a, b)

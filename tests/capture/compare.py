"""Compare a captured graph with its original: in evaluation, and over steps of training."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.graph import Graph


def assert_same(expected: Any, found: Any) -> None:
    """Require the same nesting of the same types with bit for bit the same tensors."""
    assert type(expected) is type(found)
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_evaluates_like(model: nn.Module, graph: Graph, *args: Any, **kwargs: Any) -> None:
    """Require the outputs of ``model``, in evaluation mode, from the graph."""
    # With gradients on: without, attention layers of torch take another way, which rounds differently.
    assert_same(copy.deepcopy(model).eval()(*args, **kwargs), graph.module(*args, **kwargs))


def assert_trains_like(model: nn.Module, graph: Graph, *args: Any, steps: int = 2, **kwargs: Any) -> None:
    """Require, over ``steps`` of SGD in training mode from one seed, the same outputs, gradients and state."""
    twins = (copy.deepcopy(model).train(), copy.deepcopy(graph.module).train())
    outputs: list[list[Any]] = [[], []]
    for twin, found in zip(twins, outputs, strict=True):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(twin.parameters(), 0.05)
        for _ in range(steps):
            output = twin(*args, **kwargs)
            found.append(output)
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
            optimizer.zero_grad()
            torch.stack([t.square().mean() for t in leaves]).sum().backward()
            optimizer.step()
    assert_same(*outputs)
    original, captured = (dict(twin.named_parameters()) for twin in twins)
    assert list(original) == list(captured)
    for name, parameter in original.items():
        gradient = captured[name].grad
        assert (parameter.grad is None) == (gradient is None), name
        if parameter.grad is not None and gradient is not None:
            assert torch.equal(parameter.grad, gradient), name
    states = [twin.state_dict() for twin in twins]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name

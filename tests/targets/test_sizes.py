"""Run operators on sizes that are known only at run time, and arithmetic on such sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from graphopt.graph import SPEC, Graph, Spec, TensorSpec, TraceModule
from graphopt.targets.lowering.symbols import NUMBERS
from graphopt.targets.lowering.symbols import TRANSLATIONS as SYMBOLS
from graphopt.targets.lowering.translate import TRANSLATIONS

from .cases import FAMILIES
from .single import lowered

aten = torch.ops.aten
Step = tuple[Any, tuple[Any, ...]]

X, SIZE, LAST = "x", "size", "last"
"""Stand in the arguments of a step for the input, for its number of rows, and for what the step before yielded."""


def chain(*steps: Step) -> Graph:
    """Return a graph of several calls, whose input has rows that vary."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[SPEC] = TensorSpec((3, 4), torch.float32, (True, False))
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta[SPEC] = 3
    nodes: dict[Any, Any] = {X: x, SIZE: size}
    results = [trace(steps, torch.zeros(rows, 4)) for rows in (3, 4)]
    for i, (target, args) in enumerate(steps):
        node = graph.call_function(target, tuple(nodes.get(a, a) if isinstance(a, str) else a for a in args))
        node.meta[SPEC] = described(results[0][i], results[1][i])
        nodes[LAST] = node
    graph.output((nodes[LAST],))
    module = TraceModule(nn.Module(), fx.Graph(), "Chain")
    module.graph = graph
    return Graph(module.eval(), ((torch.zeros(3, 4),), {}))


def described(small: Any, large: Any) -> Spec:
    if isinstance(small, torch.Tensor):
        dynamic = tuple(a != b for a, b in zip(small.shape, large.shape, strict=True))
        return TensorSpec(tuple(small.shape), small.dtype, dynamic)
    assert isinstance(small, int | float | bool)
    return small


def trace(steps: tuple[Step, ...], x: torch.Tensor) -> list[Any]:
    """Run the steps and return what each yields."""
    values: dict[Any, Any] = {X: x, SIZE: x.shape[0]}
    found = []
    for target, args in steps:
        values[LAST] = target(*(values.get(a, a) if isinstance(a, str) else a for a in args))
        found.append(values[LAST])
    return found


CREATED: list[tuple[Step, ...]] = [
    ((aten.zeros.default, ([2, 3],)), (aten.add.Tensor, (LAST, SIZE))),
    ((aten.sym_size.int, (X, 0)), (aten.arange.default, (LAST,))),
    ((aten.arange.start, (-2, SIZE)),),
    ((aten.arange.start_step, (0, SIZE, 2)),),
    ((operator.mul, (SIZE, 2)), (aten.linspace.default, (0.0, 1.0, LAST))),
    ((aten.linspace.default, (2.0, -1.0, SIZE)),),
    ((aten.eye.default, (SIZE,)),),
    ((aten.eye.m, (SIZE, 2)),),
    ((aten.scalar_tensor.default, (SIZE,)),),
    ((aten.sym_numel.default, (X,)), (aten.scalar_tensor.default, (LAST,))),
    ((aten.empty_like.default, (X,)), (aten.zeros_like.default, (LAST,))),
    ((aten.argmax.default, (X,)), (aten.item.default, (LAST,)), (aten.add.Scalar, (X, LAST))),
    ((aten.argmax.default, (X,)), (aten._local_scalar_dense.default, (LAST,)), (aten.add.Scalar, (X, LAST))),
]

NUMERIC: list[tuple[Step, ...]] = [
    ((operator.add, (SIZE, 2)),),
    ((operator.sub, (2, SIZE)),),
    ((operator.mul, (SIZE, SIZE)),),
    ((operator.pow, (SIZE, 2)),),
    ((operator.truediv, (SIZE, 2)),),
    ((operator.floordiv, (SIZE, 2)),),
    ((operator.neg, (SIZE,)), (operator.floordiv, (LAST, 2)), (operator.neg, (LAST,))),
    ((operator.neg, (SIZE,)), (operator.mod, (LAST, 4))),
    ((operator.truediv, (SIZE, 2)), (operator.mod, (LAST, 2))),
    ((operator.truediv, (SIZE, 2)), (math.floor, (LAST,))),
    ((operator.truediv, (SIZE, 2)), (math.ceil, (LAST,))),
    ((operator.truediv, (SIZE, 2)), (math.trunc, (LAST,))),
    ((operator.truediv, (SIZE, 2)), (torch.sym_int, (LAST,))),
    ((operator.truediv, (SIZE, 2)), (round, (LAST,))),
    ((torch.sym_float, (SIZE,)),),
    ((torch.sym_sqrt, (SIZE,)),),
    ((torch.sym_max, (SIZE, 4)),),
    ((torch.sym_min, (SIZE, 4)),),
    ((max, (SIZE, 4)),),
    ((min, (SIZE, 4)),),
    ((operator.eq, (SIZE, 3)),),
    ((operator.ne, (SIZE, 3)),),
    ((operator.lt, (SIZE, 4)),),
    ((operator.le, (SIZE, 3)),),
    ((operator.gt, (SIZE, 3)),),
    ((operator.ge, (SIZE, 4)),),
    ((operator.lt, (SIZE, 4)), (torch.sym_not, (LAST,))),
    ((operator.lt, (SIZE, 4)), (operator.and_, (LAST, True))),
    ((operator.lt, (SIZE, 4)), (operator.or_, (LAST, False))),
    ((operator.lt, (SIZE, 4)), (torch.sym_ite, (LAST, SIZE, 7))),
]

SHAPED: list[tuple[Step, ...]] = [
    ((operator.mul, (SIZE, 2)), (aten.slice.Tensor, (X, 0, 1, LAST))),
    ((operator.floordiv, (SIZE, 2)), (aten.slice.Tensor, (X, 0, LAST))),
    ((operator.sub, (SIZE, 1)), (aten.select.int, (X, 0, LAST))),
    ((operator.sub, (SIZE, 1)), (aten.narrow.default, (X, 0, 1, LAST))),
    ((aten.mul.Tensor, (X, SIZE)),),
    ((aten.add.Scalar, (X, SIZE)),),
    ((operator.truediv, (SIZE, 2)), (aten.mul.Tensor, (X, LAST))),
    ((aten.slice_scatter.default, (X, X, 0)),),
    ((aten.flip.default, (X, [0])),),
    ((aten.slice.Tensor, (X, 0, 0, 1)), (aten.slice_scatter.default, (X, LAST, 0, -1))),
    ((aten.select.int, (X, 0, 0)), (aten.select_scatter.default, (X, LAST, 0, -1))),
]


def _id(steps: tuple[Step, ...]) -> str:
    # The printed form of a Python function holds its address, which differs between the workers of pytest-xdist.
    return "-".join(getattr(s[0], "__name__", str(s[0])) for s in steps)


@pytest.mark.parametrize("steps", CREATED + NUMERIC + SHAPED, ids=_id)
def test_sizes_known_only_at_run_time(steps: tuple[Step, ...], tmp_path: Path) -> None:
    _, run = lowered(chain(*steps), tmp_path)
    for rows in (2, 3, 4, 5):
        x = torch.randn(rows, 4)
        expected = torch.as_tensor(trace(steps, x)[-1])
        (found,) = run(((x,), {}))
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, check_dtype=isinstance(trace(steps, x)[-1], torch.Tensor))


def test_every_function_on_numbers_is_tested() -> None:
    tried: set[Callable[..., Any]] = {step[0] for steps in CREATED + NUMERIC + SHAPED for step in steps}
    assert set(NUMBERS) - tried == {operator.getitem}
    assert set(SYMBOLS) - tried == set()


def test_every_translation_is_tested() -> None:
    tried = {call[0] for calls in FAMILIES.values() for call in calls()}
    tried |= {step[0] for steps in CREATED + NUMERIC + SHAPED for step in steps}
    # Those with sizes alone as arguments are tested through models in test_onnx_target: a size in a list of sizes.
    through_models = {aten.ones.default, aten.full.default, aten.empty.memory_format, aten.new_empty.default}
    assert set(TRANSLATIONS) - tried == through_models

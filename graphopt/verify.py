"""Prove that a rewrite kept its promise, on real inputs.

What may live here: the reference evaluation in which removed indices are masked, the comparison of outputs, and the
verdict. *Masked equivalence*: a model without some indices must compute what the original computes with those
indices' parameters set to zero; where an operator normalises over them, what it computes over the kept ones alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphopt.axes.algebra import Atom, Axis, Indices, kept_positions, leaves
from graphopt.axes.infer import Positions, Resizer, Typing, Value
from graphopt.dialects.onnx import runtime as onnx_runtime
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.quantized import is_quantized
from graphopt.graph import SPEC, Call, Graph, TensorSpec
from graphopt.masking import masked_graph
from graphopt.sweep import default_dtype, flatten_inputs, own, promote

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of outputs that counts as equal, by the precision of the comparison."""

ROUNDING = 1e-5
"""Largest relative difference that float32 explains by itself; one beyond it is decided in float64.

A table of small entries that lost its tie with the rest may change an output by as little as ``TOLERANCE`` allows.
"""


MADE = {4: 64, 2: 8}
"""How many units of round-off of its own type a tensor that a pass made may move the outputs by, relative, by bytes.

A product of two weights is rounded to their type as it is stored. Computing in float64 does not take that back. Of half
precision few units are allowed, for they are coarse: 0.008 for float16, 0.06 for bfloat16.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two results are apart.

    ``relative`` is the largest absolute difference over the largest absolute reference value of that output; the
    worst output counts. ``output`` is its position among the flattened outputs. ``rounding`` is how far the rounding of
    tensors that a pass made may have moved the outputs.
    """

    relative: float
    output: int
    precision: torch.dtype
    rounding: float = 0.0

    @property
    def allowed(self) -> float:
        """The largest relative difference that is round-off."""
        return max(TOLERANCE.get(self.precision, TOLERANCE[torch.float32]), self.rounding)

    @property
    def equal(self) -> bool:
        """Say whether the difference is round-off."""
        return self.relative <= self.allowed

    def __str__(self) -> str:
        bits = str(self.precision).removeprefix("torch.")
        return f"relative difference {self.relative:.1e} in output {self.output} ({bits}, allowed {self.allowed:.0e})"


def masked_equivalence(
    typing: Typing,
    keep: Mapping[Atom, Indices],
    pruned: Graph,
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> Difference:
    """Compare ``pruned`` with the typed graph whose removed indices are masked.

    Runs in the model's own precision first; a difference beyond :data:`ROUNDING` there is decided in float64.
    """
    found = _masked_difference(typing, keep, pruned, inputs or typing.graph.example_inputs, double=False)
    if found.relative <= ROUNDING:
        return found
    return _masked_difference(typing, keep, pruned, inputs or typing.graph.example_inputs, double=True)


def equivalence(
    before: Graph,
    after: Graph,
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    *,
    double: bool | None = None,
) -> Difference:
    """Compare two graphs that must compute the same.

    Where ``after`` holds tensors that ``before`` does not, what their rounding explains is allowed (:data:`MADE`).
    """
    args, kwargs = inputs or before.example_inputs
    for each in (False, True) if double is None else (double,):
        expected = evaluate(before, args, kwargs, double=each)
        found = difference(expected, evaluate(after, args, kwargs, double=each), double=each)
        if found.relative <= ROUNDING:
            break
    return replace(found, rounding=_rounding_of_made(before, after))


def _rounding_of_made(before: Graph, after: Graph) -> float:
    """Return how far the rounding of the tensors that only ``after`` holds may move the outputs."""
    known = {id(tensor) for tensor in before.tensors().values()}
    made = {t.dtype for t in after.tensors().values() if id(t) not in known and t.is_floating_point()}
    return max((MADE.get(dtype.itemsize, 0) * torch.finfo(dtype).eps for dtype in made), default=0.0)


def _masked_difference(
    typing: Typing,
    keep: Mapping[Atom, Indices],
    pruned: Graph,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    double: bool,
) -> Difference:
    args, kwargs = inputs
    expected = masked_outputs(typing, keep, args, kwargs, double=double)
    found = evaluate(pruned, args, kwargs, double=double, runtime=not double)
    return difference(expected, found, double=double)


def shape_mismatch(graph: Graph) -> str | None:
    """Run a graph on shapes alone, without values; return what does not fit, or None where everything does.

    Every operator must take its operands, and yield what the graph says it yields. So a size that was not rewritten,
    or two that no longer meet, are found; a wrong choice of indices is not.
    """
    args, kwargs = graph.example_inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    runner = _ShapeRunner(graph, mode)
    flat = flatten_inputs(graph.module, args, kwargs)
    try:
        with torch.no_grad(), mode:
            runner.run(*pytree.tree_map(runner.faked, flat), enable_io_processing=False)
    except _MismatchError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # a wrong graph raises whatever its operators raise
        return f"the result does not run on shapes: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


class _MismatchError(Exception):
    """Stops a run at the first value that is not what the graph says."""


class _ShapeRunner(fx.Interpreter):
    def __init__(self, graph: Graph, mode: FakeTensorMode) -> None:
        super().__init__(graph.module)
        self.mode = mode
        self.known: dict[str, Any] = {}

    def faked(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # What is on the meta device only waits for its values; they will be on the CPU.
        device = "cpu" if value.is_meta else value.device
        with self.mode:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self.known:
            self.known[target] = self.faked(self.fetch_attr(target))
        return self.known[target]

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        expected = n.meta.get(SPEC)
        if n.op == "call_function" and isinstance(found, torch.Tensor) and isinstance(expected, TensorSpec):
            sizes = tuple(found.shape)
            if sizes != expected.shape:
                raise _MismatchError(f"{n.name} yields {list(sizes)}, and should yield {list(expected.shape)}")
        return found


def difference(expected: Any, found: Any, *, double: bool) -> Difference:
    """Measure how far two nested results are apart.

    Results of other structure, shape or finiteness are infinitely far; integers that differ anywhere are 1 apart.
    """
    precision = torch.float64 if double else torch.float32
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    if len(left) != len(right):
        return Difference(float("inf"), 0, precision)
    worst = Difference(0.0, 0, precision)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        relative = _relative(a, b)
        if not relative <= worst.relative:
            worst = Difference(relative if relative == relative else float("inf"), i, precision)
    return worst


def _relative(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor):
        return 0.0 if a == b else float("inf")
    if not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float((a != b).any())
    a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    agree = torch.isfinite(a) & torch.isfinite(b)
    same = (a == b) | (a.isnan() & b.isnan())
    if not bool((agree | same).all()):
        return float("inf")
    a, b = torch.where(agree, a, 0.0), torch.where(agree, b, 0.0)
    scale = float(a.abs().max())
    gap = float((a - b).abs().max())
    return gap / scale if scale > 0 else gap


# -- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(
    graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, double: bool = False, runtime: bool = False
) -> Any:
    """Run ``graph`` without gradients, in evaluation mode, in its own precision or in float64.

    A graph of the ONNX dialect is run in ONNX Runtime where ``runtime`` asks for it, and where it is quantized: that
    rounding is the runtime's. Elsewhere it is interpreted, which takes less time than making a session.
    """
    runtime = not double and is_onnx(graph) and (runtime or is_quantized(graph))
    memory = _MEMORY.get()
    if memory is None:
        return _Evaluator(graph, double=double, runtime=runtime).outputs(args, kwargs)
    for found in memory:
        if found.graph is graph and found.args is args and found.kwargs is kwargs and found.how == (double, runtime):
            return found.outputs
    outputs = _Evaluator(graph, double=double, runtime=runtime).outputs(args, kwargs)
    found = _Remembered(graph, args, kwargs, (double, runtime), outputs)
    memory.append(found)
    return found.outputs


@dataclass(frozen=True, slots=True)
class _Remembered:
    graph: Graph
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    how: tuple[bool, bool]
    outputs: Any


_MEMORY: ContextVar[deque[_Remembered] | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(most: int = 4) -> Iterator[None]:
    """Within the block, evaluate a graph that is not changed any more once, however often its outputs are asked for.

    What one pass is compared with is what the pass before it made: so a row of passes costs one evaluation a pass.

    Args:
        most: how many results are held.
    """
    token = _MEMORY.set(deque(maxlen=most))
    try:
        yield
    finally:
        _MEMORY.reset(token)


def masked_outputs(
    typing: Typing,
    keep: Mapping[Atom, Indices],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    double: bool = False,
) -> Any:
    """Run the typed graph with the parameters of every removed index set to zero.

    A node that normalises over a pruned atom is evaluated on the kept indices alone; its result is zero elsewhere.
    Positions that it yields, such as those of the largest entries, are counted among all again.
    """
    return _MaskedEvaluator(typing, keep, double=double).outputs(args, kwargs)


class _Evaluator(fx.Interpreter):
    """Interpret a graph; in double mode every float tensor, and every float type asked for, becomes float64."""

    def __init__(self, graph: Graph, *, double: bool, runtime: bool = False) -> None:
        super().__init__(graph.module)
        self.runtime = runtime
        self.held = graph
        self.traced = graph.module
        self.double = double

    def outputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        flat = flatten_inputs(self.traced, args, kwargs)
        found = self._run_by_runtime(flat) if self.runtime else None
        if found is not None:
            return found
        with torch.no_grad(), default_dtype(torch.float64) if self.double else nullcontext():
            return self.run(*[self._promote(own(x)) for x in flat], enable_io_processing=False)

    def _run_by_runtime(self, flat: list[Any]) -> Any:
        """Run the graph in ONNX Runtime; None where there is none, or it cannot."""
        graph = self._whole()
        found = None if graph is None else onnx_runtime.outputs(graph, flat)
        return None if found is None else found[0] if len(found) == 1 else tuple(found)

    def _whole(self) -> Graph | None:
        return self.held

    def _promote(self, value: Any) -> Any:
        return promote(value) if self.double else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._promote(value if isinstance(value, torch.nn.Parameter) else own(value))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.double:
            args = fx.node.map_aggregate(args, self._promote)
            kwargs = fx.node.map_aggregate(kwargs, self._promote)
        return super().call_function(target, args, kwargs)


class _MaskedEvaluator(_Evaluator):
    def __init__(self, typing: Typing, keep: Mapping[Atom, Indices], *, double: bool) -> None:
        super().__init__(typing.graph, double=double, runtime=not double and is_onnx(typing.graph))
        self.typing = typing
        self.keep = {a: k for a, k in keep.items() if len(k) < a.size}

    def _whole(self) -> Graph | None:
        return masked_graph(self.typing, self.keep)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(self.fetch_attr(target), torch.nn.Parameter):
            for dim, axis in enumerate(self.typing.tensors[target]):
                kept = self._kept(axis, self.keep)
                if kept is not None:
                    removed = np.setdiff1d(np.arange(axis.size), kept)
                    value = value.detach().index_fill(dim, torch.from_numpy(removed).to(value.device), 0)
        return value

    def run_node(self, n: fx.Node) -> Any:
        atoms = self.typing.normalising.get(n, frozenset()) & self.keep.keys()
        if not atoms:
            return super().run_node(n)
        return self._run_on_kept(n, {a: self.keep[a] for a in atoms})

    def _run_on_kept(self, node: fx.Node, keep: Mapping[Atom, Indices]) -> Any:
        """Gather the kept indices of every operand, run the resized call, and put zeros where indices were removed."""
        scratch = fx.Graph()
        values: dict[fx.Node, Any] = {}
        old: dict[fx.Node, fx.Node] = {}
        for operand in node.all_input_nodes:
            twin = scratch.placeholder(operand.name)
            twin.meta = dict(operand.meta)
            old[twin] = operand
            gathered = self._gather(self.env[operand], self.typing.values[operand], keep)
            values[twin] = self._renumbered(gathered, self.typing.positions.get(operand), keep, forth=True)
        twins = {operand: twin for twin, operand in old.items()}
        call = scratch.node_copy(node, lambda n: twins[n])
        old[call] = node
        operator = self.typing.operators[node.target]
        if operator.resize is not None:
            operator.resize(
                Resizer(keep, lambda n: self.typing.values[old[n]], self.typing.facts.get(node)), Call(call)
            )
        for each in scratch.nodes:
            if each.op == "call_function":
                args, kwargs = fx.node.map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = self.call_function(each.target, args, kwargs)
        found = self._scatter(values[call], self.typing.values[node], keep)
        return self._renumbered(found, self.typing.positions.get(node), keep, forth=False)

    def _renumbered(self, value: Any, held: Positions, keep: Mapping[Atom, Indices], *, forth: bool) -> Any:
        """Count positions of an axis anew among the kept ones (``forth``), or as before any were removed."""
        if isinstance(held, list):
            return [self._renumbered(v, h, keep, forth=forth) for v, h in zip(value, held, strict=True)]
        kept = None if held is None else self._kept(held, keep)
        if kept is None:
            return value
        numbers = torch.from_numpy(kept).to(value.device)
        if forth:
            return torch.searchsorted(numbers, value.long()).to(value.dtype)
        return numbers[value.long()].to(value.dtype)

    def _gather(self, value: Any, axes: Value, keep: Mapping[Atom, Indices]) -> Any:
        if isinstance(axes, list):
            return [self._gather(v, a, keep) for v, a in zip(value, axes, strict=True)]
        if axes is None:
            return value
        for dim, axis in enumerate(axes):
            kept = self._kept(axis, keep)
            if kept is not None:
                value = value.index_select(dim, torch.from_numpy(kept).to(value.device))
        return value

    def _scatter(self, value: Any, axes: Value, keep: Mapping[Atom, Indices]) -> Any:
        if isinstance(axes, list):
            return [self._scatter(v, a, keep) for v, a in zip(value, axes, strict=True)]
        if axes is None:
            return value
        for dim, axis in enumerate(axes):
            kept = self._kept(axis, keep)
            if kept is not None:
                shape = list(value.shape)
                shape[dim] = axis.size
                value = value.new_zeros(shape).index_copy(dim, torch.from_numpy(kept).to(value.device), value)
        return value

    @staticmethod
    def _kept(axis: Axis, keep: Mapping[Atom, Indices]) -> Indices | None:
        return kept_positions(axis, keep) if any(leaf in keep for leaf in leaves(axis)) else None

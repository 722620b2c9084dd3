"""Walk a graph node by node over many batches at once, and show every call what it is given before it runs.

What may live here: the lockstep interpreter, and what it takes to evaluate a graph apart from its module. What is
measured on the way, and what becomes of it, is for the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx import _pytree as fx_pytree

from graphopt.aliases import root, written
from graphopt.errors import PassError, PipelineError
from graphopt.graph import MODE, Graph, get_attribute

__all__ = ["Inputs", "Sweep", "default_dtype", "flatten_inputs", "lockstep", "own", "promote"]

Inputs: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword inputs of one call."""

_MISFITS: Final = (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError)
"""What flattening raises for inputs of another structure."""


class Sweep:
    """Run a graph over all batches at once, one node at a time, in evaluation mode and without gradients.

    Iterating yields every operator call, and at last the output node, *before* it runs; it runs when the loop goes on.
    In the body of the loop the values that the node is about to read are there, batch by batch::

        sweep = Sweep(graph, [(batch.args, batch.kwargs) for batch in batches(calibration, graph)])
        for node in sweep:
            if node.target is torch.ops.aten.linear.default:
                for x in sweep.values(Call(node)["input"]):
                    moments.add(x, dim=-1)

    so that statistics of all layers take one pass, and none of the values outlives its last reader. Values belong to
    the walk: do not write into them, and do not keep them, for the model may write into them when it goes on.

    A parameter is fetched when the first node that needs it is reached, and let go after the last one; the same holds
    for whatever follows from parameters alone, which is computed once for all batches. :meth:`replace` puts another
    value in a parameter's place from the current node on. Inputs and buffers are copied, for a model may write into
    them; the graph and the caller's data stay as they are.

    Args:
        graph: what to run.
        batches: the inputs of each call. They are held in memory, all of them, until they were read for the last time.
        tensor: returns the tensor of a name; by default the graph's own, or what its checkpoint holds.
        double: compute in float64, whatever the model's precision.

    A sweep can be iterated any number of times, but not twice at once.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Iterable[Inputs],
        *,
        tensor: Callable[[str], Tensor] | None = None,
        double: bool = False,
    ) -> None:
        self.graph = graph
        self.double = double
        self._batches = batches
        self._tensor = tensor or graph.value
        self._lives = _Lifetimes(graph)
        self._current: fx.Node | None = None
        self._forget()

    # -- walking --

    def __iter__(self) -> Iterator[fx.Node]:
        """Yield calls and the output in order, each before it runs.

        Raises:
            PipelineError: a batch does not fit the model's inputs.
            PassError: a node broke off.
        """
        self._forget()
        try:
            self._start()
            for node in self.graph.nodes:
                if node.op == "get_attr" and node in self._lives.varying:
                    self.results(node)
                elif node.op in ("call_function", "output"):
                    self._current = node
                    yield node
                    if node.op == "call_function" and node in self._lives.varying:
                        self.results(node)
                self._let_go(node)
        finally:
            self._forget()

    @property
    def batch_count(self) -> int:
        """How many batches the running walk has."""
        return len(self._values)

    def values(self, node: Any) -> Iterator[Any]:
        """Yield the value of an operand of the current node for each batch; what is no node stands for itself."""
        for batch in range(self.batch_count):
            yield self._value(node, batch) if isinstance(node, fx.Node) else node

    def value(self, node: Any, batch: int) -> Any:
        """Return the value of an operand of the current node for one batch; what is no node stands for itself."""
        return self._value(node, batch) if isinstance(node, fx.Node) else node

    def operands(self, node: fx.Node) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield what the current node is called with, for each batch, with values in place of nodes."""
        for batch in range(self.batch_count):
            yield self._arguments(node, lambda operand: self._value(operand, batch))  # noqa: B023  # used at once

    def results(self, node: fx.Node) -> list[Any]:
        """Run the current node now, for all batches, and return what it yields; the walk does not run it again."""
        if node not in self._lives.varying:
            return [self._constant(node)] * self.batch_count
        for batch, values in enumerate(self._values):
            if node not in values:
                values[node] = self._run(node, lambda operand: self._value(operand, batch), batch)  # noqa: B023
        return [values[node] for values in self._values]

    def is_constant(self, node: fx.Node) -> bool:
        """Say whether a node yields the same for all batches, because it follows from the model's tensors alone."""
        return node not in self._lives.varying

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in the place of the tensor of that name, for the current node and all after it."""
        self._replaced[name] = tensor
        self._held.pop(name, None)
        stale = {n for n in self._constants if n.op == "get_attr" and n.target == name}
        for node in self._lives.order:
            if node in self._constants and (node in stale or any(n in stale for n in node.all_input_nodes)):
                stale.add(node)
                del self._constants[node]
        if self._current is not None:
            for values in self._values:
                values.pop(self._current, None)

    # -- values --

    def _forget(self) -> None:
        self._values: list[dict[fx.Node, Any]] = []
        self._constants: dict[fx.Node, Any] = {}
        self._held: dict[str, Any] = {}
        self._replaced: dict[str, Tensor] = {}
        self._current = None

    def _start(self) -> None:
        placeholders = self.graph.module.graph.find_nodes(op="placeholder")
        for index, (args, kwargs) in enumerate(self._batches):
            try:
                flat = flatten_inputs(self.graph.module, args, kwargs)
                if not self.graph.module.training:  # it would count a step
                    self.graph.module.enter(*flat)
                values = dict(zip(placeholders, flat, strict=True))
            except _MISFITS as error:
                raise PipelineError(
                    f"batch {index} of the calibration data does not fit the model: {error}. Give inputs of the "
                    "structure, sizes and types of the example inputs"
                ) from error
            used = {node: value for node, value in values.items() if node.users}
            self._values.append({node: self._promote(own(value)) for node, value in used.items()})

    def _value(self, node: fx.Node, batch: int) -> Any:
        return self._values[batch][node] if node in self._lives.varying else self._constant(node)

    def _constant(self, node: fx.Node) -> Any:
        """Return the value of a node that follows from tensors alone; evaluates what it follows from, in order."""
        if node not in self._constants:
            missing, stack = {node}, [node]
            while stack:
                for operand in stack.pop().all_input_nodes:
                    if operand not in missing and operand not in self._constants:
                        missing.add(operand)
                        stack.append(operand)
            for each in sorted(missing, key=self._lives.position.__getitem__):
                self._constants[each] = self._run(each, self._constants.__getitem__, 0)
        return self._constants[node]

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any], batch: int) -> Any:
        with torch.no_grad(), default_dtype(torch.float64) if self.double else nullcontext():
            if node.op == "get_attr":
                return self._fetched(node)
            args, kwargs = self._arguments(node, value)
            try:
                return node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target can be called
            except Exception as error:
                raise PassError(
                    f"running the model on batch {batch} of the calibration data broke off at {node.name} "
                    f"({node.target}): {type(error).__name__}: {error}"
                ) from error

    def _arguments(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = list(node.args), dict(node.kwargs)
        for key, (evaluation, _) in node.meta.get(MODE, {}).items():
            if isinstance(key, int):
                args[key] = evaluation
            else:
                kwargs[key] = evaluation

        def given(leaf: Any) -> Any:
            return self._promote(value(leaf) if isinstance(leaf, fx.Node) else leaf)

        return tuple(fx.node.map_aggregate(a, given) for a in args), {
            name: fx.node.map_aggregate(a, given) for name, a in kwargs.items()
        }

    def _promote(self, value: Any) -> Any:
        return promote(value) if self.double else value

    def _fetched(self, node: fx.Node) -> Any:
        name = str(node.target)
        if name not in self._held:
            if name in self._lives.bodies:
                self._held[name] = get_attribute(self.graph.module, name)
            else:
                tensor = self._replaced[name] if name in self._replaced else self._tensor(name)
                self._held[name] = self._promote(tensor.detach())
        held = self._held[name]
        return held if name in self._lives.bodies | self._lives.parameters else own(held)

    def _let_go(self, node: fx.Node) -> None:
        for each in self._lives.ending.get(node, ()):
            self._constants.pop(each, None)
            for values in self._values:
                values.pop(each, None)
        for name in self._lives.dropping.get(node, ()):
            self._held.pop(name, None)


class _Lifetimes:
    """Know, of every node of a graph, whether it differs from batch to batch, and after which node nobody reads it."""

    def __init__(self, graph: Graph) -> None:
        self.order: list[fx.Node] = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.order)}
        attributes = [node for node in self.order if node.op == "get_attr"]
        found = {str(n.target): get_attribute(graph.module, str(n.target)) for n in attributes}
        self.bodies = {name for name, value in found.items() if isinstance(value, nn.Module)}
        self.parameters = {name for name, value in found.items() if isinstance(value, nn.Parameter)}
        self.varying = self._varying()
        last = self._last()
        self.ending: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, at in last.items():
            self.ending[self.order[at]].append(node)
        final: dict[str, int] = {}
        for node in attributes:
            name = str(node.target)
            final[name] = max(final.get(name, 0), last[node])
        self.dropping: dict[fx.Node, list[str]] = defaultdict(list)
        for name, at in final.items():
            self.dropping[self.order[at]].append(name)

    def _varying(self) -> set[fx.Node]:
        """Return the nodes of which each batch has its own value: those that follow from an input, and the output.

        What the model writes into, such as a cache among its buffers, and all that follows from it is each batch's own.
        """
        varying = {node for node in self.order if node.op in ("placeholder", "output")}
        while True:
            for node in self.order:
                if any(operand in varying for operand in node.all_input_nodes):
                    varying.add(node)
            changed = {root(target) for node in self.order for target in written(node)} - varying
            if not changed:
                return varying
            varying |= changed

    def _last(self) -> dict[fx.Node, int]:
        """Return where each value is read last; a constant lives as long as what may have to be computed from it."""
        last: dict[fx.Node, int] = {}
        for node in reversed(self.order):
            ends = [self.position[node]]
            for user in node.users:
                ends.append(self.position[user])
                if user not in self.varying:
                    ends.append(last[user])
            last[node] = max(ends)
        return last


def lockstep(first: Sweep, second: Sweep) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
    """Walk two graphs at once: yield the node of either graph that is about to run, paired by name.

    A node that only one graph has is yielded with None in the other place. Of a pair neither has run: what either is
    about to read can be looked at, and what the second reads can be replaced.

    Raises:
        PassError: the graphs run nodes of the same name in different orders.
    """
    left, right = iter(first), iter(second)
    common = {n.name for n in first.graph.nodes} & {n.name for n in second.graph.nodes}
    for a in left:
        if a.name not in common:
            yield a, None
            continue
        for b in right:
            if b.name in common:
                break
            yield None, b
        else:
            raise PassError(f"two graphs do not go together: the second has no {a.name} where the first has it")
        if a.name != b.name:
            raise PassError(f"two graphs do not go together: one runs {a.name} where the other runs {b.name}")
        yield a, b
    for b in right:
        yield None, b


# -- evaluating apart from the module --------------------------------------------------------------------------------


def flatten_inputs(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values of the graph's placeholders for a call of the module."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return list(args)
    return list(fx_pytree.tree_flatten_spec((tuple(args), dict(kwargs)), info.in_spec))


def own(value: Any) -> Any:
    """Copy an input or a buffer, for the model may write into it."""
    return value.clone() if isinstance(value, Tensor) else value


def promote(value: Any) -> Any:
    """Return what stands for a value in float64: floating-point tensors and types become double, the rest stays."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors of this type by default, within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

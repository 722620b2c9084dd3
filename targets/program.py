"""Turn a graph into a ``torch.export`` program, and make the inputs on which artifacts are checked.

What may live here: what several targets do with a graph before they go their own ways.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.errors import LoweringError, VerificationError
from graphopt.graph import SPEC, Graph, TensorSpec
from graphopt.targets.base import Check
from graphopt.verify import difference, evaluate

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one call."""

_CHATTY: Final = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch.onnx", "onnxscript")


def to_program(graph: Graph) -> ExportedProgram:
    """Export ``graph`` in evaluation mode; what is dynamic in the graph is dynamic in the program.

    Raises:
        LoweringError: if ``torch.export`` refuses the graph; the cause is chained.
    """
    # Sizes 0 and 1 are constants to an export: dynamic dimensions of that size are repeated first.
    args, kwargs = resized(graph, lambda size: 3 * size if size < 2 else size)
    module = graph.module.replica().eval()
    shapes = ShapesCollection()
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for leaf, spec in zip(leaves, tensor_inputs(graph), strict=True):
        if any(spec.dynamic):
            shapes[leaf] = {d: Dim.AUTO for d, dynamic in enumerate(spec.dynamic) if dynamic}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                module, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(module, args, kwargs), strict=False
            )
    except Exception as error:  # torch.export raises whatever an operator raises
        first = " ".join(str(error).split("\n\n")[0].split())
        raise LoweringError(
            f"torch.export refuses the graph: {type(error).__name__}: {first}. Every operator must run on fake "
            "tensors: register a fake implementation (torch.library.register_fake) for operators of your own"
        ) from error


def tensor_inputs(graph: Graph) -> list[TensorSpec]:
    """Return the types of the graph's tensor inputs, in order."""
    specs = (node.meta.get(SPEC) for node in graph.module.graph.find_nodes(op="placeholder"))
    return [spec for spec in specs if isinstance(spec, TensorSpec)]


def resized(graph: Graph, size: Callable[[int], int]) -> Inputs:
    """Return the example inputs with other sizes in their dynamic dimensions.

    A dimension that grows takes rows from a reversed copy, so that rows differ, in the same order in every input.

    Args:
        graph: says which dimensions are dynamic.
        size: gives the new size for an old one.
    """
    specs = iter(tensor_inputs(graph))

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for dimension, dynamic in enumerate(next(specs).dynamic):
            old = leaf.shape[dimension]
            new = size(old) if dynamic else old
            if new != old:
                whole = torch.cat([leaf, leaf.flip(dimension)], dimension)
                order = torch.arange(new, device=leaf.device) % max(2 * old, 1)
                leaf = whole.index_select(dimension, order)
        return leaf

    return pytree.tree_map(other, graph.example_inputs)  # type: ignore[no-any-return]


def check(
    graph: Graph, runtime: str, run: Callable[[Inputs], list[Any]], positions: Sequence[int] | None = None
) -> tuple[Check, ...]:
    """Compare an artifact with its graph on the example inputs, and at other sizes of the dynamic dimensions.

    The other sizes are twice the example's, and one row; a size that the graph itself refuses (more positions than
    an embedding holds) is left out.

    Args:
        graph: what must be computed.
        runtime: what runs the artifact, for reports and messages.
        run: runs the artifact and returns its outputs, flattened.
        positions: which of the graph's flattened outputs those are; all of them if not given.

    Raises:
        VerificationError: if an output is further off than round-off explains.
    """
    sizes = {size for spec in tensor_inputs(graph) for size, d in zip(spec.shape, spec.dynamic, strict=True) if d}
    runs: list[tuple[str, Callable[[int], int]]] = [("example", lambda size: size)]
    if sizes:
        common = math.gcd(*sizes)
        runs.append(("twice the batch", lambda size: 2 * size))
        if common > 1:
            runs.append(("batch of one", lambda size: size // common))
    checks = []
    for name, size in runs:
        inputs = resized(graph, size)
        try:
            expected = evaluate(graph, *inputs)
        except (RuntimeError, IndexError, ValueError):
            if name == "example":
                raise
            continue
        checks.append(compare(graph, runtime, name, inputs, _select(expected, positions), run(inputs), positions))
    return tuple(checks)


def _select(outputs: Any, positions: Sequence[int] | None) -> list[Any]:
    """Return the flattened outputs at ``positions``, numbers as tensors."""
    leaves = pytree.tree_leaves(outputs)
    if positions is None:
        return leaves
    return [torch.as_tensor(leaves[i]) for i in positions]


def compare(
    graph: Graph,
    runtime: str,
    name: str,
    inputs: Inputs,
    expected: list[Any],
    found: list[Any],
    positions: Sequence[int] | None = None,
) -> Check:
    """Compare one result of an artifact with the graph's.

    Some models amplify rounding: where float32 results differ by more than is usual, the graph's own distance from
    its float64 result says how much of that is noise.

    Raises:
        VerificationError: if an output is further off than round-off explains.
    """
    types = [(a.dtype, b.dtype) for a, b in zip(expected, found, strict=True) if isinstance(a, torch.Tensor)]
    if any(a != b for a, b in types):
        raise VerificationError(f"what was written for {runtime} returns other types than the graph ({name}): {types}")
    done = Check(runtime, name, difference(expected, found, double=False))
    if not done.difference.equal:
        exact = _select(evaluate(graph, *inputs, double=True), positions)
        done = replace(done, noise=difference(exact, expected, double=False).relative)
    if not done.passed:
        raise VerificationError(
            f"what was written for {runtime} does not compute what the graph computes ({name}): {done.difference}; the "
            f"graph's own rounding explains {done.noise:.1e}. Nothing was written: please report the model"
        )
    return done


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's and onnx's exporters print and warn of; what matters comes back as an error."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)

"""Check what a pass promised, and find the groups that are to blame where the promise is broken.

What may live here: promises and their comparison on inputs. Who is told, and what is taken back, is for the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import fx, nn

from graphopt.axes.algebra import Atom, Indices
from graphopt.dialects.onnx.facts import ONNX
from graphopt.graph import SPEC
from graphopt.pipeline.base import PassResult, Removal
from graphopt.report import Comparison
from graphopt.rewrite import rewrite
from graphopt.verify import Difference, equivalence, masked_equivalence, shape_mismatch

if TYPE_CHECKING:
    from graphopt.graph import Graph

__all__ = ["Failure", "Inputs", "Promise", "bisect", "find_offenders", "measure", "same"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one call."""

MASKED: Final = "the pruned and the masked model"

Name = TypeVar("Name", bound=Hashable)

NOISE: Final = 0.1
"""How far constant parameters are moved for the second check, relative to their value."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Say that a model could not even be run."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Promise:
    """What one pass, or several in a row, promised.

    Attributes:
        before: The graph from before.
        edited: The graph that the pass handed back, before indices are removed from it.
        removal: What is removed; None where nothing is.
        after: The graph after the last of the passes, once another promise begins; None for the latest.
        positions: Where the passes stand in the pipeline.
    """

    before: Graph
    edited: Graph
    removal: Removal | None
    after: Graph | None = None
    positions: tuple[int, ...] = ()

    @classmethod
    def of(cls, result: PassResult, before: Graph) -> Promise:
        """Read the promise from what a pass handed back; a removal of nothing is none."""
        removal = result.removal
        if removal is not None and not any(len(kept) < atom.size for atom, kept in removal.keep.items()):
            removal = None
        return cls(before, result.graph, removal)

    @property
    def words(self) -> str:
        """The promise in words."""
        if self.removal is None:
            return "the outputs must stay as they were"
        return "the outputs must be those of the model from before with the removed indices masked"

    def extended(self, position: int) -> Promise:
        """Return the promise of one more pass in the row."""
        return replace(self, positions=(*self.positions, position))

    def ended(self, after: Graph) -> Promise:
        """Return the promise with the graph after its last pass."""
        return replace(self, after=after)

    def rewritten(self, keep: Mapping[Atom, Indices] | None = None) -> Graph:
        """Return the graph without the removed indices, or with other keep sets."""
        if self.removal is None:
            return self.edited
        return rewrite(self.removal.typing, self.removal.keep if keep is None else keep)

    def comparisons(self, after: Graph, inputs: Sequence[tuple[str, Inputs]]) -> Iterator[Comparison | Failure]:
        """Compare on every input; then once more with noise in the parameters that are constant, where there are any.

        A graph whose values are not in memory is run on shapes alone; that it fits is all that is found out.

        Constant parameters (a new batch norm's weights, a branch that starts at zero) look alike or hide what they
        multiply, so that a wrong rewrite could pass for a right one.
        """
        removal = self.removal
        if after.hollow:
            mismatch = shape_mismatch(after) if inputs else None
            if mismatch is not None:
                yield Failure(mismatch)
            return
        for label, each in inputs:
            if removal is None:
                yield _compared("the model before and after", label, equivalence, self.before, after, each)
                continue
            if not same(self.before, self.edited):
                yield _compared("the model before and to be pruned", label, equivalence, self.before, self.edited, each)
            yield _compared(MASKED, label, masked_equivalence, removal.typing, removal.keep, after, each)
        if removal is not None and inputs:
            found = self._compared_with_noise(removal, *inputs[0])
            if found is not None:
                yield found

    def broken(self, after: Graph, inputs: Sequence[tuple[str, Inputs]]) -> str | None:
        """Say in words what is wrong with a graph, or None."""
        return next((str(c) for c in self.comparisons(after, inputs) if isinstance(c, Failure) or not c.passed), None)

    def _compared_with_noise(self, removal: Removal, label: str, inputs: Inputs) -> Comparison | Failure | None:
        with generic_parameters(removal.typing.graph) as moved:
            if not moved:
                return None
            subject = f"{MASKED}, with noise in {len(moved)} constant tensors"
            return _compared(subject, label, masked_equivalence, removal.typing, removal.keep, self.rewritten(), inputs)


def measure(name: str, before: Graph, after: Graph, label: str, inputs: Inputs) -> Comparison:
    """Measure how far the outputs moved, without judging it."""
    return Comparison.of(
        f"before and after {name}", equivalence(before, after, inputs, double=False), label, measured=True
    )


def find_offenders(promise: Promise, inputs: Sequence[tuple[str, Inputs]]) -> dict[str, str]:
    """Return the groups without which the promise is kept, by name, each with what is wrong when it is cut.

    Bisection: k groups to blame among n are found with about 2 k log2(n) comparisons. The groups that remain pass all
    together, with the keep sets they have.
    """
    removal = promise.removal
    assert removal is not None
    typing = removal.typing
    groups = [g for g in typing.groups if g.atom in removal.keep and len(removal.keep[g.atom]) < g.size]
    names = {g.atom: g.name for g in groups}

    def wrong(atoms: Sequence[Atom]) -> str | None:
        keep = {a: removal.keep[a] for a in atoms}
        part = replace(promise, removal=Removal(typing, keep))
        try:
            after = part.rewritten()
        except Exception as error:  # noqa: BLE001  # a resizer that meets what it does not expect raises anything
            return f"{type(error).__name__}: {error}"
        return part.broken(after, inputs)

    blamed = bisect([g.atom for g in groups], wrong)
    return {names[atom]: why for atom, why in blamed.items()}


def bisect(candidates: Sequence[Name], wrong: Callable[[Sequence[Name]], str | None]) -> dict[Name, str]:
    """Return the candidates without which nothing is wrong, each with what is wrong with it; all others together pass.

    Args:
        candidates: what may be to blame.
        wrong: says what is wrong when these candidates, and no others, take part; None where nothing is.
    """
    blamed: dict[Name, str] = {}

    def search(part: Sequence[Name], sound: Sequence[Name], found: str) -> list[Name]:
        """Return those of ``part`` that are sound together with ``sound``; all of them together are not: ``found``."""
        if len(part) == 1:
            blamed[part[0]] = found
            return []
        passed: list[Name] = []
        for half in (part[: len(part) // 2], part[len(part) // 2 :]):
            together = [*sound, *passed]
            failure = wrong([*together, *half])
            passed += half if failure is None else search(half, together, failure)
        return passed

    failure = wrong(candidates)
    if failure is not None and candidates:
        search(candidates, [], failure)
    return blamed


@contextmanager
def generic_parameters(graph: Graph) -> Iterator[list[str]]:
    """Lend a graph with noise in its constant floating-point tensors; yields their names, and restores them."""
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in graph.tensors().items():
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                value = tensor.detach()
                moved = torch.where(value == 0, NOISE * noise, value * (1 + NOISE * noise))
                kept[name] = tensor
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                graph.set_tensor(name, moved)
        yield list(kept)
    finally:
        for name, tensor in kept.items():
            graph.set_tensor(name, tensor)


def same(before: Graph, after: Graph) -> bool:
    """Say whether two graphs hold the same operators and the very same tensors, under the same names."""
    left, right = before.tensors(), after.tensors()
    if left.keys() != right.keys() or any(left[name] is not right[name] for name in left):
        return False
    if before.module.meta.get(ONNX) != after.module.meta.get(ONNX):
        return False
    nodes = zip_longest(before.nodes, after.nodes)
    return all(a is not None and b is not None and _same_node(a, b) for a, b in nodes)


def _same_node(a: fx.Node, b: fx.Node) -> bool:
    return (
        a.name == b.name
        and a.op == b.op
        and a.target == b.target
        and a.meta.get(SPEC) == b.meta.get(SPEC)
        and _same_value(a.args, b.args)
        and _same_value(a.kwargs, b.kwargs)
    )


def _same_value(a: Any, b: Any) -> bool:
    """Compare arguments of two graphs: nodes by name, 1 and 1.0 and True as different."""
    if isinstance(a, fx.Node):
        return isinstance(b, fx.Node) and a.name == b.name
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or repr(a) == repr(b))


def _compared(subject: str, label: str, compare: Callable[..., Difference], *arguments: Any) -> Comparison | Failure:
    try:
        return Comparison.of(subject, compare(*arguments), label)
    except Exception as error:  # noqa: BLE001  # a wrong graph raises whatever its operators raise
        first = " ".join(str(error).split("\n\n")[0].split())
        return Failure(f"the result does not run: {type(error).__name__}: {first}")

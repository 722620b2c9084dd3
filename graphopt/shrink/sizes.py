"""Say which sizes become which: of a model's groups under a plan, and near each of its modules.

What may live here: the way from a plan back to a typing's atoms, and the pairs ``(old, new)`` of all sizes that a
module's code may speak of. Nothing here knows attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from math import prod

import numpy as np

from graphopt.axes.algebra import Atom, Axis, Concat, Indices, Product, index_at, kept_positions, leaves, size_of
from graphopt.axes.infer import Typing, Value
from graphopt.errors import PlanError
from graphopt.graph import OWNER

__all__ = ["Kept", "Pair", "Pairs", "Sizes", "kept_atoms"]

Kept = Mapping[str, Mapping[int, Indices]]
"""``{tensor: {dimension: kept positions}}``, as a plan has it."""

Pair = tuple[int, int]
"""A size before and after."""

Pairs = frozenset[Pair]

MOST_FACTORS = 6
"""Of a product with more factors only neighbouring ones are multiplied."""


def kept_atoms(typing: Typing, kept: Kept, names: Iterable[str]) -> dict[Atom, Indices]:
    """Return what each group keeps under a plan: the inverse of ``Plan.of``.

    Args:
        typing: the typed graph of the whole model.
        kept: the plan's kept positions.
        names: every tensor that the model has.

    Raises:
        PlanError: the plan names other tensors or shapes, or cuts what cannot be cut in this model's own code.
    """
    absent = sorted(kept.keys() - set(names) - typing.tensors.keys())
    if absent:
        raise PlanError(
            f"the plan shrinks {absent[0]}, and the module has no such parameter or buffer: apply it to the model it "
            "was made for"
        )
    keep: dict[Atom, Indices] = {}
    for group in typing.groups:
        place = group.places[0]
        positions = kept.get(place.tensor, {}).get(place.dim)
        if positions is not None and len(positions) and positions[-1] < place.axis.size:
            indices = np.unique(index_at(place.axis, group.atom)[positions])
            indices = indices[indices >= 0]
            if len(indices) < group.size:
                keep[group.atom] = indices
    for name, axes in typing.tensors.items():
        for dim, axis in enumerate(axes):
            wanted = kept.get(name, {}).get(dim)
            found = kept_positions(axis, keep) if any(leaf in keep for leaf in leaves(axis)) else None
            if not _same(wanted, found, axis.size):
                count = axis.size if wanted is None else len(wanted)
                raise PlanError(
                    f"the plan keeps {count} of the {axis.size} indices in dimension {dim} of {name} in a way that the "
                    "module's own code cannot compute with: another pass than pruning rearranged the tensor first, or "
                    "the plan is another model's. Use result.module, or prune without that pass"
                )
    return keep


def _same(wanted: Indices | None, found: Indices | None, size: int) -> bool:
    if wanted is None or found is None:
        present = wanted if found is None else found
        return present is None or len(present) == size
    return np.array_equal(wanted, found)


class Sizes:
    """Know every size of a typed model before and after its groups keep ``keep``."""

    def __init__(self, typing: Typing, keep: Mapping[Atom, Indices]) -> None:
        """Prepare; pairs are worked out once for each axis."""
        self.typing = typing
        self.new = {atom: len(indices) for atom, indices in keep.items()}
        self._known: dict[int, Pairs] = {}
        self._tensors: dict[str, Pairs] = {}
        self._calls: dict[str, Pairs] = {}
        for name, axes in typing.tensors.items():
            for alias in typing.graph.names(name):
                path = alias.rpartition(".")[0]
                self._tensors[path] = self._tensors.get(path, frozenset()) | self.of(axes)
        for node, value in typing.values.items():
            if node.op == "call_function":
                owner = str(node.meta.get(OWNER, ""))
                self._calls[owner] = self._calls.get(owner, frozenset()) | self.of(value)

    def of(self, value: Value) -> Pairs:
        """Return the pairs of all sizes in a value's axes: of each axis, its factors, its parts, and their runs."""
        if isinstance(value, list):
            return frozenset().union(*map(self.of, value))
        if value is None:
            return frozenset()
        return frozenset().union(*map(self._axis, value))

    def tensors(self, path: str) -> Pairs:
        """Return the pairs of a module's own tensors and those of its direct parts."""
        own = [p for p in self._tensors if p == path or p.rpartition(".")[0] == path]
        return frozenset().union(*(self._tensors[p] for p in own))

    def calls(self, path: str) -> Pairs:
        """Return the pairs of what a module's own code computes."""
        return self._calls.get(path, frozenset())

    def within(self, path: str) -> Pairs:
        """Return the pairs of everything in a module and below it."""
        inside = [
            pairs
            for table in (self._tensors, self._calls)
            for p, pairs in table.items()
            if not path or p == path or p.startswith(f"{path}.")
        ]
        return frozenset().union(*inside)

    def changed(self) -> frozenset[int]:
        """Return every size, anywhere in the model, that becomes another."""
        return frozenset(old for old, new in self.within("") if old != new)

    def _axis(self, axis: Axis) -> Pairs:
        found = self._known.get(id(axis))
        if found is None:
            found = self._known[id(axis)] = frozenset(
                pair for pair in ((old, size_of(part, self.new)) for part, old in _parts(axis)) if pair[0] > 1
            )
        return found


def _parts(axis: Axis) -> Iterator[tuple[Axis, int]]:
    """Yield an axis, what it is made of, and the runs of these that a size in code may stand for."""
    if isinstance(axis, Atom):
        if axis.bound is not None:
            yield from _parts(axis.bound)
        else:
            yield axis, axis.size
        return
    yield axis, axis.size
    if isinstance(axis, Product):
        count = len(axis.factors)
        chosen = (
            (c for size in range(2, count) for c in combinations(axis.factors, size))
            if count <= MOST_FACTORS
            else (axis.factors[i:j] for i in range(count) for j in range(i + 2, count + 1))
        )
        for factors in chosen:
            yield Product(tuple(factors)), prod(f.size for f in factors)
        for factor in axis.factors:
            yield from _parts(factor)
    elif isinstance(axis, Concat):
        for start in range(len(axis.parts)):
            for stop in range(start + 1, min(len(axis.parts), start + MOST_FACTORS) + 1):
                run = Concat(axis.parts[start:stop])
                yield run, run.size
        for part in axis.parts:
            yield from _parts(part)

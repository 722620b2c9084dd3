"""Say which sizes each group may take.

What may live here: the options that bound an allocation, and their translation into bounds and steps of each group.
Nothing here knows scores or costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from graphopt.axes.algebra import Atom, Axis, Concat, Indices, Product, leaves
from graphopt.errors import PipelineError, nearest_name, unknown_name

if TYPE_CHECKING:
    from graphopt.axes.groups import Group

__all__ = ["Constraints", "Limits", "Order"]

Order = Literal["after", "together", "never"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes each group may take, one entry a group: multiples of ``step`` from ``lower`` to ``upper``.

    The bounds themselves are allowed whether or not they are multiples, so that a whole group stays as it is.
    """

    lower: Indices
    upper: Indices
    step: Indices

    def rounded(self, sizes: np.typing.ArrayLike) -> Indices:
        """Return the nearest allowed sizes, halves upwards."""
        wanted = np.asarray(sizes, dtype=np.float64)
        nearest = np.clip(np.floor(wanted / self.step + 0.5).astype(np.int64) * self.step, self.lower, self.upper)
        nearest = np.where(self.upper - wanted <= np.abs(nearest - wanted), self.upper, nearest)
        return np.where(wanted - self.lower < np.abs(nearest - wanted), self.lower, nearest)

    def above(self, sizes: Indices) -> Indices:
        """Return the next larger allowed sizes; ``upper`` has none larger."""
        larger: Indices = np.minimum((sizes // self.step + 1) * self.step, self.upper)
        return larger

    def below(self, sizes: Indices) -> Indices:
        """Return the next smaller allowed sizes; ``lower`` has none smaller."""
        smaller: Indices = np.maximum((-(-sizes // self.step) - 1) * self.step, self.lower)
        return smaller


@dataclass(frozen=True)
class Constraints:
    """Bound what an allocator may do.

    A pattern is a shell wildcard. It matches a group when it matches the name of one of its parameters
    (``layer4.*.weight``), the path of a module that holds one (``layer4``, ``*.attn``), or is the name of one of its
    dimensions (``fc.weight[1]``). So all groups that a matching tensor takes part in are meant, and an excluded layer
    keeps its shape in every dimension.

    Attributes:
        min_keep: Share of every group that stays at least; one index stays in any case. Keeps layers from collapsing.
        channel_multiple: Sizes are multiples of this. Where several groups make up one dimension, as heads and head
            dimensions do, one of them is stepped such that the whole dimension is a multiple. Groups that are no
            larger than the multiple, and whole ones, are exempt.
        include: Patterns of the groups that may be pruned.
        exclude: Patterns of the groups that may not.
        bounds: Own bounds by pattern, in place of `min_keep`: `{pattern: (least, most)}`, up to 1 a share of the
            group, above 1 a count. Where several match, the closest of each side holds.
        normalised: What happens to groups that something normalises over, such as the embedding width under a layer
            norm; pruning them is exact only up to that normalisation. "after": only once half of every other group
            does not suffice, and then along with them; "together": like any other; "never": they stay whole.

    Raises:
        PipelineError: a field has a value outside its range.
    """

    min_keep: float = 0.1
    channel_multiple: int = 1
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    normalised: Order = "after"

    def __post_init__(self) -> None:
        if not 0 <= self.min_keep <= 1:
            raise PipelineError(f"min_keep must be a share from 0 to 1; found {self.min_keep!r}")
        if isinstance(self.channel_multiple, bool) or self.channel_multiple < 1 or self.channel_multiple % 1:
            raise PipelineError(f"channel_multiple must be a whole number from 1 on; found {self.channel_multiple!r}")
        if self.normalised not in get_args(Order):
            raise PipelineError(unknown_name("value of normalised", str(self.normalised), get_args(Order)))
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise PipelineError(f"{name} must be a list of patterns; found the text {getattr(self, name)!r}")
        for pattern, (least, most) in self.bounds.items():
            if not 0 <= least <= most or most == 0:
                raise PipelineError(
                    f"bounds of '{pattern}' must be 0 <= least <= most and most above 0, shares up to 1 and counts "
                    f"above; found ({least}, {most})"
                )

    def limits(self, groups: Sequence[Group], names: Mapping[str, Sequence[str]] | None = None) -> Limits:
        """Return the bounds and steps of the groups.

        Args:
            groups: the groups, in the order of the result.
            names: every name of a tensor by the name the groups use; a tensor that is not listed has one.

        Raises:
            PipelineError: a pattern matches no group.
        """
        called = [_names(group, names or {}) for group in groups]
        included = self._matching(self.include, called)
        excluded = self._matching(self.exclude, called)
        own = {pattern: self._matching([pattern], called) for pattern in self.bounds}
        steps = _steps(groups, int(self.channel_multiple))
        lower, upper = [], []
        for i, group in enumerate(groups):
            least, most = self.min_keep * group.size, float(group.size)
            bounds = [self.bounds[pattern] for pattern, matching in own.items() if i in matching]
            if bounds:
                least = max(_count(b[0], group.size) for b in bounds)
                most = min(_count(b[1], group.size) for b in bounds)
            if i not in included or i in excluded:
                least = most = float(group.size)
            step = steps.get(group.atom, 1)
            # A share of 0.1 of 30 is 3 although 0.1 * 30 is a little more.
            least = max(least, group.least)
            low = min(group.size, max(1, math.ceil(math.ceil(least - 1e-9) / step)) * step)
            high = group.size if most >= group.size else max(low, int(most + 1e-9) // step * step)
            lower.append(low)
            upper.append(high)
        return Limits(
            np.array(lower, dtype=np.int64),
            np.array(upper, dtype=np.int64),
            np.array([steps.get(group.atom, 1) for group in groups], dtype=np.int64),
        )

    def _matching(self, patterns: Iterable[str], called: Sequence[frozenset[str]]) -> frozenset[int]:
        """Return the positions of the groups that any pattern matches."""
        found: set[int] = set()
        for pattern in patterns:
            matches = {i for i, names in enumerate(called) if any(_matches(n, pattern) for n in names)}
            if not matches and called and pattern != "*":
                nearest = nearest_name(pattern, {name for names in called for name in names})
                hint = f"; did you mean '{nearest}'?" if nearest else ""
                raise PipelineError(
                    f"the pattern '{pattern}' matches no parameter that can be pruned{hint} A pattern matches the "
                    "names of parameters, of the modules that hold them, or of one dimension ('fc.weight[1]')"
                )
            found |= matches
        return frozenset(found)


def _matches(name: str, pattern: str) -> bool:
    """Match a shell wildcard, also one whose brackets are those of a dimension: ``blocks.*.qkv.weight[0]``."""
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


def _count(bound: float, size: int) -> float:
    return bound * size if bound <= 1 else float(bound)


def _names(group: Group, names: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return what a pattern may match: tensors, the modules above them, and dimensions."""
    found = {group.name}
    for place in group.places:
        for name in names.get(place.tensor, (place.tensor,)):
            found |= {name, f"{name}[{place.dim}]"}
            parts = name.split(".")
            found.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return frozenset(found)


def _steps(groups: Sequence[Group], multiple: int) -> dict[Atom, int]:
    """Return the step of each group whose sizes must go in steps, so that whole dimensions are multiples."""
    if multiple == 1:
        return {}
    free = {group.atom for group in groups}
    axes = {id(place.axis): place.axis for group in groups for place in group.places}
    products = [p for axis in axes.values() for p in _products(axis)]
    composed = {leaf for p in products for leaf in leaves(p)} & free
    steps = {atom: multiple for atom in free - composed if atom.size > multiple}
    for p in products:
        needed = multiple
        candidates: list[Atom] = []
        for factor in p.factors:
            inside = set(leaves(factor)) & free
            if not inside:
                needed //= math.gcd(needed, factor.size)
            elif isinstance(factor, Atom):
                candidates.append(factor)
        able = [atom for atom in candidates if atom.size > needed]
        if needed > 1 and able:
            carrier = max(able, key=lambda atom: atom.size)
            steps[carrier] = math.lcm(steps.get(carrier, 1), needed)
    return steps


def _products(axis: Axis) -> list[Product]:
    if isinstance(axis, Product):
        return [axis]
    return [p for part in axis.parts for p in _products(part)] if isinstance(axis, Concat) else []

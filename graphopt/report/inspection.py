"""Say what a model is made of: its groups, what must stay whole and why, and the cost by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.axes.algebra import Atom, leaves
from graphopt.axes.coupling import CouplingGraph
from graphopt.cost import Cost, CostModel, LayerCost

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from graphopt.axes.infer import Typing

__all__ = ["FrozenRow", "GroupRow", "Inspection", "UnknownRow", "at_stake", "frozen_rows", "unknown_rows"]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group of coupled indices.

    `params` and `flops` are those of everything that its indices take part in: what would be gone without the group.
    `normalised` names the nodes that normalise over it; the other indices' results change when one of them goes.
    """

    name: str
    role: str
    size: int
    places: tuple[str, ...]
    params: int
    flops: int
    normalised: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """One reason why dimensions of parameters must stay whole.

    `places` are these dimensions, `nodes` the operators that demand it. `params` are the elements of those parameters,
    `flops` the operations along those dimensions. One parameter may stand under several reasons.
    """

    reason: str
    places: tuple[str, ...]
    nodes: tuple[str, ...]
    params: int
    flops: int


@dataclass(frozen=True, slots=True)
class UnknownRow:
    """One operator that has no axis rule, and the nodes that call it; whatever it touches stays whole."""

    operator: str
    nodes: tuple[str, ...]


def at_stake(costs: CostModel) -> dict[Atom, tuple[int, int]]:
    """Return the parameters and the floating-point operations that involve each group, by its atom."""
    params = -costs.params.changes(costs.full, -costs.full)
    flops = -costs.flops.changes(costs.full, -costs.full)
    return {g.atom: (round(p), round(f)) for g, p, f in zip(costs.groups, params, flops, strict=True)}


def frozen_rows(typing: Typing) -> list[FrozenRow]:
    """Return why dimensions of parameters must stay whole, the costliest reason first."""
    places: dict[str, dict[str, None]] = {}
    nodes: dict[str, dict[str, None]] = {}
    tensors: dict[str, set[str]] = {}
    atoms: dict[Atom, str] = {}
    for place, reason in typing.frozen():
        places.setdefault(reason.text, {})[str(place)] = None
        nodes.setdefault(reason.text, {})[reason.node] = None
        tensors.setdefault(reason.text, set()).add(place.tensor)
        for leaf in leaves(place.axis):
            if leaf.frozen is not None and leaf.frozen.text == reason.text:
                atoms[leaf] = reason.text
    flops = dict.fromkeys(places, 0)
    for terms in typing.macs.values():
        for axes in terms:
            reasons = {atoms[leaf] for axis in axes for leaf in leaves(axis) if leaf in atoms}
            for reason_text in reasons:
                flops[reason_text] += 2 * prod(axis.size for axis in axes)
    rows = [
        FrozenRow(
            reason=text,
            places=tuple(found),
            nodes=tuple(nodes[text]),
            params=sum(typing.graph.tensor(name).numel() for name in tensors[text]),
            flops=flops[text],
        )
        for text, found in places.items()
    ]
    return sorted(rows, key=lambda row: (-row.flops, -row.params))


def unknown_rows(typing: Typing) -> list[UnknownRow]:
    """Return the operators without an axis rule, the most frequent first."""
    found: dict[str, list[str]] = {}
    for node in typing.unknown:
        found.setdefault(str(node.target), []).append(node.name)
    return [UnknownRow(name, tuple(nodes)) for name, nodes in sorted(found.items(), key=lambda item: -len(item[1]))]


@dataclass(frozen=True)
class Inspection:
    """What a model is made of. Printed as tables in a terminal.

    Attributes:
        model: The model's name.
        cost: What it costs, for the batch of the example inputs.
        groups: The groups of coupled indices, in graph order.
        frozen: Why dimensions of parameters must stay whole.
        unknown: The operators that have no axis rule.
        layers: The cost by layer, in the order of the graph.
        notes: What capture had to say.
    """

    model: str
    cost: Cost
    groups: tuple[GroupRow, ...]
    frozen: tuple[FrozenRow, ...]
    unknown: tuple[UnknownRow, ...]
    layers: tuple[LayerCost, ...]
    notes: tuple[str, ...]
    typing: Typing = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: str, typing: Typing) -> Inspection:
        """Inspect a typed graph."""
        costs = CostModel(typing)
        stakes = at_stake(costs)
        groups = tuple(
            GroupRow(g.name, g.role, g.size, tuple(map(str, g.places)), *stakes[g.atom], g.normalised)
            for g in typing.groups
        )
        return cls(
            model=model,
            cost=costs.cost(),
            groups=groups,
            frozen=tuple(frozen_rows(typing)),
            unknown=tuple(unknown_rows(typing)),
            layers=tuple(costs.layers()),
            notes=tuple(typing.graph.notes),
            typing=typing,
        )

    @cached_property
    def coupling(self) -> CouplingGraph:
        """What ties what, as a networkx graph (`.nx`) that can be drawn (`.dot()`, `.write_graphml(path)`)."""
        return CouplingGraph(self.typing)

    @cached_property
    def smallest(self) -> Cost:
        """What the model would cost with one index left of every group: no budget can ask for less."""
        return CostModel(self.typing).cost(np.ones(len(self.groups), dtype=np.int64))

    def to_dict(self) -> Mapping[str, Any]:
        """Return everything but the coupling graph as plain values."""
        return {
            "model": self.model,
            "cost": self.cost.to_dict(),
            "smallest": self.smallest.to_dict(),
            "groups": [_plain(row) for row in self.groups],
            "frozen": [_plain(row) for row in self.frozen],
            "unknown": [_plain(row) for row in self.unknown],
            "layers": [_plain(row) for row in self.layers],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from graphopt.report.terminal import inspection_parts

        yield from inspection_parts(self)

    def __str__(self) -> str:
        from graphopt.report.terminal import as_text

        return as_text(self)


def _plain(row: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(row).items()}

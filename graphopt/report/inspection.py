"""Say what a model is made of: its groups, what must stay whole and why, and the cost by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.text import Text

from graphopt.axes.algebra import Atom, leaves
from graphopt.axes.coupling import CouplingGraph
from graphopt.cost import Cost, CostModel, LayerCost
from graphopt.report.records import FrozenRow, GroupRow, UnknownRow
from graphopt.report.terminal import MOST_ROWS, as_text, bullets, frozen_table, table
from graphopt.report.wording import amount, bytes_of, listing, percent, plural

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from graphopt.axes.infer import Typing

__all__ = ["Inspection", "at_stake", "frozen_rows", "unknown_rows"]


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
    for node, terms in typing.macs.items():
        read = {str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"}
        for axes in terms:
            reasons = {atoms[leaf] for axis in axes for leaf in leaves(axis) if leaf in atoms}
            for text in reasons:
                if read & tensors[text]:
                    flops[text] += 2 * prod(axis.size for axis in axes)
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
            GroupRow(
                g.name,
                g.role,
                g.size,
                tuple(map(str, g.places)),
                *stakes[g.atom],
                g.normalised,
                typing.graph.layer_of(g.places[0].tensor),
            )
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
        yield from self._parts()

    def __str__(self) -> str:
        return as_text(self)

    def _parts(self, most: int = MOST_ROWS) -> Iterator[RenderableType]:
        cost, least = self.cost, self.smallest
        yield Text.from_markup(
            f"[bold]{escape(self.model)}[/]: {amount(cost.flops)} flops, {amount(cost.params)} parameters, "
            f"{bytes_of(cost.weight_bytes)} of weights, {bytes_of(cost.peak_activation_bytes)} of activations"
        )
        yield Text.from_markup(
            f"[dim]With a single index left of every group: {percent(least.flops, cost.flops)} of the flops, "
            f"{percent(least.params, cost.params)} of the parameters. No budget can ask for less.[/]"
        )
        groups = sorted(self.groups, key=lambda row: -row.flops)
        columns = ("group", "role", "size", "places", "parameters", "flops", "normalised over by")
        listed = table(*columns, title=f"Groups ({len(groups)})")
        for row in groups[:most]:
            stake = (amount(row.params), amount(row.flops))
            over = escape(listing(row.normalised, 1))
            name = escape(row.name) + (f" [dim]{escape(row.layer)}[/]" if row.layer else "")
            listed.add_row(name, row.role, str(row.size), str(len(row.places)), *stake, over)
        yield listed
        if len(groups) > most:
            yield Text(f"  and {plural(len(groups) - most, 'group')} more", style="dim")
        if self.frozen:
            yield frozen_table(self.frozen)
        if self.unknown:
            unknown = table("operator", "calls", "nodes", title="Operators without an axis rule")
            for each in self.unknown:
                unknown.add_row(escape(each.operator), str(len(each.nodes)), escape(listing(each.nodes)))
            yield unknown
        yield from self._layers(most)
        if self.notes:
            yield bullets("Notes", self.notes)

    def _layers(self, most: int) -> Iterator[RenderableType]:
        layers = sorted(self.layers, key=lambda row: -row.macs)
        costs = table("layer", "flops", "", "parameters", "weights", "activations", title="Cost by layer")
        for layer in layers[:most]:
            costs.add_row(
                escape(layer.name) or "[dim]the model itself[/]",
                amount(2 * layer.macs),
                percent(layer.macs, self.cost.macs),
                amount(layer.params),
                bytes_of(layer.weight_bytes),
                bytes_of(layer.activation_bytes),
            )
        yield costs
        if len(layers) > most:
            rest = percent(sum(layer.macs for layer in layers[most:]), self.cost.macs)
            yield Text(f"  and {plural(len(layers) - most, 'layer')} more with {rest} of the flops", style="dim")


def _plain(row: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(row).items()}

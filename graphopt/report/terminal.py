"""Render reports and inspections as tables for a terminal, with rich."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graphopt.axes.coupling import Explanation, Step, Tie
from graphopt.errors import PipelineError, nearest_name
from graphopt.graph import OWNER
from graphopt.report.records import BudgetLine, Comparison, Site
from graphopt.report.wording import amount, bytes_of, listing, percent, plural, seconds

if TYPE_CHECKING:
    from graphopt.report.inspection import Inspection
    from graphopt.report.report import Report

__all__ = ["as_text", "explanation_lines", "inspection_parts", "print_explanation", "report_parts", "statistics"]

WIDTH = 112
"""Columns of the text that `str()` gives."""
MOST_ROWS = 24
"""Rows of a table before the rest is summed up; pages and JSON have all of them."""
MOST_PLACES = 16
"""Places of an explanation whose paths are printed; the rest is counted."""

COSTS = (
    ("flops", "flops", amount),
    ("params", "parameters", amount),
    ("weight_bytes", "weights", bytes_of),
    ("peak_activation_bytes", "peak activations", bytes_of),
    ("memory", "memory", bytes_of),
)


def as_text(renderable: Any) -> str:
    """Return what `rich` would print, without colours."""
    console = Console(file=StringIO(), width=WIDTH, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


# -- reports --------------------------------------------------------------------------------------------------------


def report_parts(report: Report) -> Iterator[RenderableType]:
    """Yield the parts of a report, from the outcome to the details."""
    title = f"[bold]{escape(report.model)}[/] → [bold]{escape(report.target)}[/]   [dim]{escape(report.pipeline)}[/]"
    yield Text.from_markup(title)
    if report.warnings:
        yield Panel(
            Group(*(Text(f"• {w}") for w in report.warnings)),
            title="Warnings",
            title_align="left",
            border_style="yellow",
        )
    yield _costs(report)
    groups = [site for site in (*report.groups, *report.left_alone) if "kept" in site.facts]
    if any(site.applied for site in groups):
        yield _groups(groups)
    others = [site for site in report.groups if "kept" not in site.facts]
    if others:
        yield _listed("Applied", [f"{site.name}: {site.reason}" for site in others])
    if report.left_alone:
        yield _left_alone(report.left_alone)
    if report.frozen:
        yield _frozen(report.frozen)
    comparisons = [c for each in report.passes for c in each.comparisons] + report.comparisons
    if comparisons:
        yield _verification(comparisons)
    notes = [*report.notes, *(note for each in report.passes for note in each.notes)]
    if notes:
        yield _listed("Notes", notes)
    if report.artifacts:
        yield _listed("Written", [f"{kind}: {path}" for kind, path in report.artifacts.items()])
    total = sum(report.timings.values())
    stages = ", ".join(f"{name} {seconds(spent)}" for name, spent in report.timings.items())
    yield Text.from_markup(f"[dim]{seconds(total)}: {escape(stages)}; seed {report.seed}[/]")


def _costs(report: Report) -> Table:
    table = _table("", "before", "after", "left", "", "budget")
    lines = {line.dimension: line for line in report.budget}
    for name, label, written in COSTS:
        before, after = getattr(report.before, name), getattr(report.after, name)
        asked = _asked(lines[name], written(lines[name].target)) if name in lines else ""
        table.add_row(
            label, written(before), f"[bold]{written(after)}[/]", percent(after, before), _bar(after, before), asked
        )
    if report.score is not None:
        before, after = report.score
        table.add_row("metric", f"{before:.4g}", f"[bold]{after:.4g}[/]", f"{after - before:+.4g}", "", "")
    return table


def _asked(line: BudgetLine, written: str) -> str:
    mark = "[green]met[/]" if line.met else "[red]not met[/]"
    return f"at most {written} ({percent(line.target, line.original)}) {mark}"


def _bar(part: float, whole: float, width: int = 16) -> str:
    filled = round(width * min(part / whole, 1)) if whole else 0
    return f"[cyan]{'━' * filled}[/][dim]{'─' * (width - filled)}[/]"


def _groups(sites: Sequence[Site]) -> RenderableType:
    cut = sorted((s for s in sites if s.applied), key=lambda s: -s.facts.get("flops", 0))
    table = _table("group", "role", "kept", "of", "", "places", title=f"Groups ({len(cut)} of {len(sites)} cut)")
    for site in cut[:MOST_ROWS]:
        facts = site.facts
        name = escape(site.name) + (" [dim]normalised over[/]" if facts.get("normalised") else "")
        row = (
            str(facts["kept"]),
            str(facts["size"]),
            _bar(facts["kept"], facts["size"], 12),
            str(len(facts["places"])),
        )
        table.add_row(name, facts["role"], *row)
    return _with_rest(table, cut[MOST_ROWS:])


def _with_rest(table: Table, rest: Sequence[Site]) -> RenderableType:
    if not rest:
        return table
    kept, size = (sum(site.facts[key] for site in rest) for key in ("kept", "size"))
    more = f"and {plural(len(rest), 'group')} more, {kept:,} of {size:,} indices kept"
    return Group(table, Text(f"  {more}", style="dim"))


def _left_alone(sites: Sequence[Site]) -> Table:
    by_reason: dict[str, list[str]] = {}
    for site in sites:
        by_reason.setdefault(_general(site), []).append(site.name)
    table = _table("left alone", "sites", "which", title="Left alone, and why")
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        table.add_row(escape(reason), str(len(names)), escape(listing(names, 2)))
    return table


def _general(site: Site) -> str:
    """Return the reason without the site's own size, so that like reasons stand together."""
    size = site.facts.get("size")
    return site.reason.replace(f"its {size} indices", "its indices").replace(f"all {size} indices", "all indices")


def _frozen(rows: Iterable[Any]) -> RenderableType:
    found = list(rows)
    table = _table(
        "must stay whole because", "dims", "parameters", "flops", "which", title="Dimensions that cannot shrink"
    )
    for row in found[:MOST_ROWS]:
        table.add_row(
            escape(row.reason),
            str(len(row.places)),
            amount(row.params),
            amount(row.flops),
            escape(listing(row.places, 2)),
        )
    rest = len(found) - MOST_ROWS
    return Group(table, Text.from_markup(f"  [dim]and {plural(rest, 'reason')} more[/]")) if rest > 0 else table


def _verification(comparisons: Sequence[Comparison]) -> Table:
    table = _table("compared", "on", "difference", "allowed", "in", title="Verification")
    for each in comparisons:
        difference = f"[green]{each.relative:.1e}[/]" if each.passed else f"[red]{each.relative:.1e}[/]"
        allowed = f"{each.allowed:.0e}" if each.allowed is not None else "[dim]measured[/]"
        table.add_row(escape(each.subject), escape(each.inputs), difference, allowed, each.precision)
    return table


def statistics(report: Report, *, times: bool = True, counts: bool = True) -> Table:
    """Return a table with a line a pass: what it took, and what it did."""
    columns = ["pass"]
    columns += ["time", "verification"] if times else []
    columns += ["changed", "applied", "skipped", "flops", "parameters"] if counts else []
    table = _table(*columns, title="Passes")
    for each in report.passes:
        row = [escape(each.text)]
        if times:
            row += [seconds(each.seconds), seconds(each.verify_seconds)]
        if counts:
            row += ["yes" if each.changed else "no", str(len(each.applied)), str(len(each.skipped))]
            for name in ("flops", "params"):
                row.append(f"{amount(getattr(each.before, name))} → {amount(getattr(each.after, name))}")
        table.add_row(*row)
    return table


# -- inspections ----------------------------------------------------------------------------------------------------


def inspection_parts(inspection: Inspection, most: int = MOST_ROWS) -> Iterator[RenderableType]:
    """Yield the parts of an inspection."""
    cost, least = inspection.cost, inspection.smallest
    yield Text.from_markup(
        f"[bold]{escape(inspection.model)}[/]: {amount(cost.flops)} flops, {amount(cost.params)} parameters, "
        f"{bytes_of(cost.weight_bytes)} of weights, {bytes_of(cost.peak_activation_bytes)} of activations at the peak"
    )
    yield Text.from_markup(
        f"[dim]With a single index left of every group: {percent(least.flops, cost.flops)} of the flops, "
        f"{percent(least.params, cost.params)} of the parameters. No budget can ask for less.[/]"
    )
    groups = sorted(inspection.groups, key=lambda row: -row.flops)
    table = _table("group", "role", "size", "places", "parameters", "flops", "", title=f"Groups ({len(groups)})")
    for row in groups[:most]:
        normalised = f"[dim]normalised over by {escape(listing(row.normalised, 1))}[/]" if row.normalised else ""
        stake = (amount(row.params), amount(row.flops))
        table.add_row(escape(row.name), row.role, str(row.size), str(len(row.places)), *stake, normalised)
    yield table
    if len(groups) > most:
        yield Text.from_markup(f"  [dim]and {plural(len(groups) - most, 'group')} more[/]")
    if inspection.frozen:
        yield _frozen(inspection.frozen)
    if inspection.unknown:
        unknown = _table("operator", "calls", "nodes", title="Operators without an axis rule")
        for each in inspection.unknown:
            unknown.add_row(escape(each.operator), str(len(each.nodes)), escape(listing(each.nodes)))
        yield unknown
    layers = sorted(inspection.layers, key=lambda row: -row.macs)
    costs = _table("layer", "flops", "", "parameters", "weights", "activations", title="Cost by layer")
    for layer in layers[:most]:
        costs.add_row(
            escape(layer.name) or "[dim]the model itself[/]",
            amount(2 * layer.macs),
            percent(layer.macs, cost.macs),
            amount(layer.params),
            bytes_of(layer.weight_bytes),
            bytes_of(layer.activation_bytes),
        )
    yield costs
    if len(layers) > most:
        rest = sum(layer.macs for layer in layers[most:])
        more = f"and {plural(len(layers) - most, 'layer')} more with {percent(rest, cost.macs)} of the flops"
        yield Text(f"  {more}", style="dim")
    if inspection.notes:
        yield _listed("Notes", inspection.notes)


# -- explanations ---------------------------------------------------------------------------------------------------


def print_explanation(inspection: Inspection, parameter: str, dim: int, *, most: int = MOST_PLACES) -> None:
    """Print in words what ties a dimension.

    Raises:
        PipelineError: there is no such parameter or dimension.
    """
    console = Console(highlight=False, soft_wrap=True)
    for line in explanation_lines(inspection, parameter, dim, most=most):
        console.print(line)


def explanation_lines(inspection: Inspection, parameter: str, dim: int, *, most: int = MOST_PLACES) -> Iterator[Text]:
    """Yield in words what ties a dimension; errors as in :func:`print_explanation`."""
    graph = inspection.typing.graph
    tensors = inspection.typing.tensors
    name = graph.aliases.get(parameter, parameter)
    if name not in tensors:
        nearest = nearest_name(parameter, [n for each in tensors for n in graph.names(each)])
        raise PipelineError(
            f"{inspection.model} reads no parameter '{parameter}'"
            + (f"; did you mean '{nearest}'?" if nearest else "; model.named_parameters() lists those there are")
        )
    rank = len(tensors[name])
    if not -rank <= dim < rank:
        raise PipelineError(
            f"{parameter} has {plural(rank, 'dimension')}, numbered from 0; there is no dimension {dim}"
        )
    explanation = inspection.coupling.explain(name, dim)
    yield from _explained(explanation, parameter, inspection, most)


def _explained(explanation: Explanation, parameter: str, inspection: Inspection, most: int) -> Iterator[Text]:
    shared = f" (the same tensor as {explanation.tensor})" if parameter != explanation.tensor else ""
    size = plural(explanation.size, "position")
    yield Text.from_markup(f"[bold]{escape(parameter)}[/]{escape(shared)}, dimension {explanation.dim}: {size}")
    if not explanation.ties:
        yield Text("  A single position: there is nothing that could be removed.")
    elif len(explanation.ties) > 1:
        yield Text(f"  It is made of several parts, {explanation.axis}; each is explained on its own.")
    words = _Words(inspection)
    for tie in explanation.ties:
        yield from _tied(tie, words, most)


def _tied(tie: Tie, words: _Words, most: int) -> Iterator[Text]:
    if tie.frozen is not None:
        yield Text.from_markup(
            f"\n  [red]{escape(tie.axis)} ({tie.size}) must stay whole[/]: {escape(tie.frozen.text)}, "
            f"at {escape(words.operator(tie.frozen.node))}."
        )
        for _, steps in tie.paths:
            yield Text(f"    The way there: {words.way(steps)}")
        return
    if tie.group is None:
        yield Text(f"\n  {tie.axis} ({tie.size}) belongs to no parameter, so there is nothing to remove.")
        return
    yield Text.from_markup(
        f"\n  [green]{escape(tie.axis)} can shrink[/]: {plural(tie.size, 'index', 'indices')} "
        f"({escape(tie.group.role)}), which stand or fall in {plural(len(tie.paths) + 1, 'place')} together."
    )
    if tie.group.normalised:
        over = listing([words.operator(node) for node in tie.group.normalised], 2)
        yield Text(f"  Normalised over by {over}: without an index, the others' results change.")
    paths = sorted(tie.paths, key=lambda path: len(path[1]))
    for place, steps in paths[:most]:
        yield Text.from_markup(f"    [bold]{escape(place)}[/]  [dim]{escape(words.way(steps))}[/]")
    if len(paths) > most:
        rest = [place for place, _ in paths[most:]]
        yield Text(f"    and {plural(len(rest), 'place')} more: {listing(rest, 6)}")


class _Words:
    """Name operators as a person would look for them."""

    def __init__(self, inspection: Inspection) -> None:
        self.nodes = {node.name: node for node in inspection.typing.graph.nodes}

    def operator(self, name: str) -> str:
        """Return the node's name, what it calls unless the name says so, and the module it stands in."""
        node = self.nodes.get(name)
        if node is None or node.op == "placeholder":
            return f"the input {name}" if node is not None else name
        if node.op == "output":
            return "the model's output"
        called = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        owner = node.meta.get(OWNER)
        said = "" if name.rstrip("0123456789").rstrip("_") == called.rstrip("_") else f" ({called})"
        return f"{name}{said}" + (f" in {owner}" if owner else "")

    def way(self, steps: Sequence[Step]) -> str:
        """Return the operators of a path."""
        return "through " + " → ".join(self.operator(step.operator) for step in steps) if steps else "directly"


# -- parts ----------------------------------------------------------------------------------------------------------


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    right = {"before", "after", "left", "kept", "of", "size", "places", "parameters", "flops", "dims", "sites", "calls"}
    right |= {"weights", "activations", "difference", "allowed", "time", "verification", "applied", "skipped"}
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _listed(title: str, lines: Iterable[str]) -> RenderableType:
    return Group(Text(title, style="bold"), *(Padding(Text(f"• {line}"), (0, 0, 0, 2)) for line in lines))

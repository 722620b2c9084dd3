"""Render accounts as tables for a terminal, with rich; the parts serve other renderings, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graphopt.report.records import Account, BudgetLine, Comparison, FrozenRow, Site
from graphopt.report.wording import amount, bytes_of, listing, percent, plural, seconds

__all__ = ["COSTS", "MOST_ROWS", "as_text", "bullets", "frozen_table", "report_parts", "statistics", "table"]

WIDTH = 112
"""Columns of the text that `str()` gives."""
MOST_ROWS = 24
"""Rows of a table before the rest is summed up; pages and JSON have all of them."""

NUMBER = re.compile(r"\d[\d,.]*")

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


def report_parts(report: Account) -> Iterator[RenderableType]:
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
    if report.groups:
        yield _groups(report.groups, sum("kept" in site.facts for _, site in report.left_alone))
    if report.others:
        yield _others(report.others)
    if report.left_alone:
        yield _left_alone(report.left_alone)
    if report.frozen:
        yield frozen_table(report.frozen)
    if report.compared:
        yield _verification(report.compared)
    notes = [*report.notes, *(note for each in report.passes for note in each.notes)]
    if notes:
        yield bullets("Notes", notes)
    if report.artifacts:
        yield bullets("Written", [f"{kind}: {path}" for kind, path in report.artifacts.items()])
    total = sum(report.timings.values())
    stages = ", ".join(f"{name} {seconds(spent)}" for name, spent in report.timings.items())
    yield Text.from_markup(f"[dim]{seconds(total)}: {escape(stages)}; seed {report.seed}[/]")


def _costs(report: Account) -> Table:
    drawn = table("", "before", "after", "left", "", "budget")
    lines = {line.dimension: line for line in report.budget}
    for name, label, written in COSTS:
        before, after = getattr(report.before, name), getattr(report.after, name)
        asked = _asked(lines[name], written(lines[name].target)) if name in lines else ""
        drawn.add_row(
            label, written(before), f"[bold]{written(after)}[/]", percent(after, before), _bar(after, before), asked
        )
    if report.score is not None:
        before, after = report.score
        drawn.add_row("metric", f"{before:.4g}", f"[bold]{after:.4g}[/]", f"{after - before:+.4g}", "", "")
    return drawn


def _asked(line: BudgetLine, written: str) -> str:
    mark = "[green]met[/]" if line.met else "[red]not met[/]"
    return f"≤ {written}, {mark}"


def _bar(part: float, whole: float, width: int = 12) -> str:
    filled = round(width * min(part / whole, 1)) if whole else 0
    return f"[cyan]{'━' * filled}[/][dim]{'─' * (width - filled)}[/]"


def _groups(sites: Sequence[Site], whole: int) -> RenderableType:
    cut = sorted(sites, key=lambda s: -s.facts.get("flops", 0))
    drawn = table("group", "role", "kept", "of", "", "places", title=f"Groups ({len(cut)} of {len(cut) + whole} cut)")
    for site in cut[:MOST_ROWS]:
        facts = site.facts
        layer = f" [dim]{escape(facts['layer'])}[/]" if facts.get("layer") else ""
        name = escape(site.name) + layer + (" [dim]normalised over[/]" if facts.get("normalised") else "")
        row = (
            str(facts["kept"]),
            str(facts["size"]),
            _bar(facts["kept"], facts["size"], 12),
            str(len(facts["places"])),
        )
        drawn.add_row(name, facts["role"], *row)
    return _with_rest(drawn, cut[MOST_ROWS:])


def _with_rest(drawn: Table, rest: Sequence[Site]) -> RenderableType:
    if not rest:
        return drawn
    kept, size = (sum(site.facts[key] for site in rest) for key in ("kept", "size"))
    more = f"and {plural(len(rest), 'group')} more, {kept:,} of {size:,} indices kept"
    return Group(drawn, Text(f"  {more}", style="dim"))


def _others(sites: Sequence[tuple[str, Site]]) -> Table:
    drawn = table("pass", "applied", "for example", title="What else was done")
    for name, found in _by(sites, lambda name, _: name).items():
        first = found[0][1]
        drawn.add_row(
            escape(name), str(len(found)), escape(f"{first.name}: {first.reason}" if first.reason else first.name)
        )
    return drawn


def _left_alone(sites: Sequence[tuple[str, Site]]) -> RenderableType:
    by_reason = _by(sites, lambda name, site: (name, NUMBER.sub("", site.reason)))
    drawn = table("pass", "left alone", "sites", "which", title="Left alone, and why")
    rows = sorted(by_reason.values(), key=len, reverse=True)
    for found in rows[:MOST_ROWS]:
        name, first = found[0]
        which = listing([site.name for _, site in found], 2)
        drawn.add_row(escape(name), escape(_general(first)), str(len(found)), escape(which))
    rest = rows[MOST_ROWS:]
    return Group(drawn, Text(f"  and {plural(len(rest), 'reason')} more", style="dim")) if rest else drawn


def _by(sites: Iterable[tuple[str, Site]], key: Callable[[str, Site], Any]) -> dict[Any, list[tuple[str, Site]]]:
    found: dict[Any, list[tuple[str, Site]]] = {}
    for name, site in sites:
        found.setdefault(key(name, site), []).append((name, site))
    return found


def _general(site: Site) -> str:
    """Return the reason without the site's own size, so that like reasons stand together."""
    size = site.facts.get("size")
    return site.reason.replace(f"its {size} indices", "its indices").replace(f"all {size} indices", "all indices")


def frozen_table(rows: Iterable[FrozenRow]) -> RenderableType:
    """Return the reasons why dimensions must stay whole."""
    found = list(rows)
    drawn = table(
        "must stay whole because", "dims", "parameters", "flops", "which", title="Dimensions that cannot shrink"
    )
    for row in found[:MOST_ROWS]:
        drawn.add_row(
            escape(row.reason),
            str(len(row.places)),
            amount(row.params),
            amount(row.flops),
            escape(listing(row.places, 2)),
        )
    rest = len(found) - MOST_ROWS
    return Group(drawn, Text.from_markup(f"  [dim]and {plural(rest, 'reason')} more[/]")) if rest > 0 else drawn


def _verification(comparisons: Sequence[tuple[str, Comparison]]) -> Table:
    alike: dict[Any, list[tuple[str, Comparison]]] = {}
    for name, each in comparisons:
        alike.setdefault((each.subject, each.inputs, each.precision, each.allowed), []).append((name, each))
    drawn = table("compared", "on", "difference", "allowed", "in", title="Verification")
    for found in alike.values():
        name, worst = max(found, key=lambda item: (not item[1].passed, item[1].relative))
        subject = worst.subject
        if len(found) > 1:
            subject += f", {len(found)} times" + (f"; worst after {name}" if name and worst.relative > 0 else "")
        difference = f"[green]{worst.relative:.1e}[/]" if worst.passed else f"[red]{worst.relative:.1e}[/]"
        allowed = f"{worst.allowed:.0e}" if worst.allowed is not None else "[dim]measured[/]"
        drawn.add_row(escape(subject), escape(worst.inputs), difference, allowed, worst.precision)
    return drawn


def statistics(report: Account, *, times: bool = True, counts: bool = True) -> RenderableType:
    """Return two lines a pass: its text, and what it took and what it did."""
    lines: list[RenderableType] = [Text("Passes", style="bold")]
    for each in report.passes:
        facts = []
        if times:
            facts += [seconds(each.seconds), f"{seconds(each.verify_seconds)} of verification"]
        if counts:
            facts += ["changed" if each.changed else "no change"]
            facts += [f"{len(each.applied)} applied", f"{len(each.skipped)} skipped"]
            facts += [f"{amount(each.before.flops)} → {amount(each.after.flops)} flops"]
            facts += [f"{amount(each.before.params)} → {amount(each.after.params)} parameters"]
        lines.append(Text(f"  {each.position + 1}. {each.text}"))
        lines.append(Text(f"     {', '.join(facts)}", style="dim"))
    return Group(*lines)


# -- parts ----------------------------------------------------------------------------------------------------------


def table(*columns: str, title: str = "") -> Table:
    """Return a table without rows; columns of numbers are set flush right, and what is short stays on one line."""
    drawn = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    right = {"before", "after", "left", "kept", "of", "size", "places", "parameters", "flops", "dims", "sites", "calls"}
    right |= {"weights", "activations", "difference", "allowed", "time", "verification", "applied", "skipped"}
    short = right | {"", "role", "budget", "on", "in", "changed"}
    for column in columns:
        drawn.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in short
        )
    return drawn


def bullets(title: str, lines: Iterable[str]) -> RenderableType:
    """Return a list with a title."""
    return Group(Text(title, style="bold"), *(Padding(Text(f"• {line}"), (0, 0, 0, 2)) for line in lines))

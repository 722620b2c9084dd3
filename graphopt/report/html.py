"""Render a report as a page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from graphopt.report.records import Account, BudgetLine, Comparison, Site
from graphopt.report.terminal import COSTS
from graphopt.report.wording import amount, percent, plural, seconds

__all__ = ["fragment", "page"]

STYLE: Final = """
.graphopt{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--back:#fff;--card:#f6f8fa;--bar:#2f6fed;--rest:#d5dce6;
  --good:#1a7f4b;--bad:#c0362c;--warn:#8a5a00;--warnback:#fff6e0;color:var(--ink);background:var(--back);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;max-width:1080px;
  margin:0 auto;padding:28px 24px 48px}
@media (prefers-color-scheme:dark){.graphopt{--ink:#e6eaf0;--soft:#98a4b3;--line:#313a46;--back:#12161c;--card:#1a2029;
  --bar:#5b93ff;--rest:#323c4a;--good:#5fcf94;--bad:#ff8076;--warn:#f3c46b;--warnback:#2c2413}}
.graphopt h1{font-size:24px;line-height:1.25;margin:0 0 4px;font-weight:650}
.graphopt h2{font-size:17px;margin:34px 0 10px;font-weight:650}
.graphopt p{margin:6px 0}.graphopt ul{margin:6px 0;padding-left:20px}.graphopt .soft{color:var(--soft)}
.graphopt code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.graphopt .warning{background:var(--warnback);border-left:4px solid var(--warn);border-radius:4px;padding:10px 14px;
  margin:18px 0}
.graphopt .warning b{color:var(--warn)}
.graphopt .cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:20px 0 8px}
.graphopt .card{background:var(--card);border-radius:8px;padding:12px 14px}
.graphopt .card .label{color:var(--soft);font-size:13px}
.graphopt .card .value{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
.graphopt .card .was{color:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}
.graphopt .bar{height:6px;border-radius:3px;background:var(--rest);overflow:hidden;margin:7px 0 5px;position:relative}
.graphopt .bar i{display:block;height:100%;background:var(--bar)}
.graphopt td .bar{min-width:90px;margin:0}
.graphopt .wide{overflow-x:auto}
.graphopt table{border-collapse:collapse;width:100%;font-size:14px;background:transparent;color:inherit}
.graphopt th{text-align:left;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);
  padding:5px 12px 5px 0;white-space:nowrap;background:transparent}
.graphopt td{text-align:left;border-bottom:1px solid var(--line);padding:5px 12px 5px 0;vertical-align:middle;
  background:transparent}
.graphopt td>code,.graphopt td>.name{white-space:nowrap}
.graphopt .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.graphopt .good{color:var(--good)}.graphopt .bad{color:var(--bad)}
.graphopt details{margin:6px 0}.graphopt summary{cursor:pointer;color:var(--soft)}
"""


def page(report: Account) -> str:
    """Return a whole page."""
    title = escape(f"{report.model} for {report.target}: graphopt")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>html{{background:#fff}}body{{margin:0}}"
        "@media (prefers-color-scheme:dark){html{background:#12161c}}</style></head>\n"
        f"<body>{fragment(report)}</body></html>\n"
    )


def fragment(report: Account) -> str:
    """Return the content of the page, with its style, to stand inside another page."""
    parts = [
        f"<style>{STYLE}</style>",
        f"<h1>{escape(report.model)} <span class=soft>for</span> {escape(report.target)}</h1>",
        f"<p class=soft><code>{escape(report.pipeline) or 'no passes'}</code></p>",
        _warnings(report.warnings),
        _cards(report),
        _bullets(report.sentences()),
        _budget(report.budget),
        _groups(report.groups),
        _applied(report.others),
        _left_alone(report.left_alone),
        _frozen(report),
        _unknown(report),
        _verification(report.compared),
        _passes(report),
        _notes(report),
        _footer(report),
    ]
    return f"<div class=graphopt>{''.join(part for part in parts if part)}</div>"


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f"<div class=warning><b>Warning.</b> {escape(w)}</div>" for w in warnings)


def _cards(report: Account) -> str:
    cards = []
    for name, label, written in COSTS:
        before, after = getattr(report.before, name), getattr(report.after, name)
        cards.append(
            f"<div class=card><div class=label>{escape(label)}</div><div class=value>{written(after)}</div>"
            f"{_bar(after, before)}<div class=was>{percent(after, before)} of {written(before)}</div></div>"
        )
    if report.score is not None:
        before, after = report.score
        cards.append(
            f"<div class=card><div class=label>metric</div><div class=value>{after:.4g}</div>"
            f"<div class=was>{after - before:+.4g} from {before:.4g}</div></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _budget(lines: Sequence[BudgetLine]) -> str:
    rows = [
        (
            escape(line.dimension),
            _number(amount(line.original)),
            _number(f"{amount(line.target)} ({percent(line.target, line.original)})"),
            _number(f"{amount(line.achieved)} ({percent(line.achieved, line.original)})"),
            "<span class=good>met</span>" if line.met else "<span class=bad>not met</span>",
        )
        for line in lines
    ]
    return _section("Budget", _table(("", "#original", "#at most", "#reached", ""), rows)) if rows else ""


def _groups(sites: Sequence[Site]) -> str:
    rows = []
    for site in sorted(sites, key=lambda s: -s.facts.get("flops", 0)):
        facts = site.facts
        places = facts["places"]
        rows.append(
            (
                f"<code>{escape(site.name)}</code>"
                + (f" <span class=soft>{escape(facts['layer'])}</span>" if facts.get("layer") else ""),
                escape(facts["role"]) + (" <span class=soft>normalised over</span>" if facts["normalised"] else ""),
                _number(f"{facts['kept']:,}"),
                _number(f"{facts['size']:,}"),
                _bar(facts["kept"], facts["size"]),
                _number(amount(facts["flops"])),
                _number(amount(facts["params"])),
                _folded(plural(len(places), "place"), places),
            )
        )
    columns = ("group", "role", "#kept", "#of", "", "#flops", "#parameters", "where")
    intro = (
        "<p class=soft>Indices of a group stand or fall together, wherever they occur. Flops and parameters are those "
        "of everything the whole group took part in.</p>"
    )
    return _section(f"What was removed: {plural(len(rows), 'group')}", intro + _table(columns, rows)) if rows else ""


def _applied(sites: Sequence[tuple[str, Site]]) -> str:
    by_pass: dict[str, list[Site]] = {}
    for name, site in sites:
        by_pass.setdefault(name, []).append(site)
    rows = [
        (_name(name), _number(f"{len(found):,}"), _folded(*_told(found, [f"{s.name}: {s.reason}" for s in found])))
        for name, found in by_pass.items()
    ]
    return _section("What else was done", _table(("pass", "#sites", "where and what"), rows)) if rows else ""


def _left_alone(sites: Sequence[tuple[str, Site]]) -> str:
    by_reason: dict[tuple[str, str], list[Site]] = {}
    for name, site in sites:
        by_reason.setdefault((name, site.reason), []).append(site)
    rows = [
        (_name(name), _number(f"{len(found):,}"), _folded(*_told(found, [s.name for s in found])), escape(reason))
        for (name, reason), found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    columns = ("pass", "#sites", "which", "why")
    return _section(f"What was left alone: {plural(len(sites), 'site')}", _table(columns, rows)) if rows else ""


def _name(text: str) -> str:
    """Return the name of a pass, which stays on one line."""
    return f"<span class=name>{escape(text)}</span>"


def _told(sites: Sequence[Site], lines: list[str]) -> tuple[str, list[str]]:
    """Return the line that is always shown, and those that fold out."""
    return (lines[0], []) if len(lines) == 1 else (f"{sites[0].name} and {len(sites) - 1} more", lines)


def _frozen(report: Account) -> str:
    rows = [
        (
            escape(row.reason),
            _folded(plural(len(row.places), "dimension"), row.places),
            _folded(plural(len(row.nodes), "operator"), row.nodes),
            _number(amount(row.params)),
            _number(amount(row.flops)),
        )
        for row in report.frozen
    ]
    intro = (
        "<p class=soft>Dimensions of parameters that cannot lose an index without changing what the model takes, "
        "returns or means. A parameter may stand under several reasons.</p>"
    )
    columns = ("reason", "which", "demanded by", "#parameters", "#flops")
    return _section("What must stay whole", intro + _table(columns, rows)) if rows else ""


def _unknown(report: Account) -> str:
    rows = [
        (f"<code>{escape(r.operator)}</code>", _folded(plural(len(r.nodes), "call"), r.nodes)) for r in report.unknown
    ]
    intro = "<p class=soft>These operators are carried along as they are; whatever they touch stays whole.</p>"
    return _section("Operators without an axis rule", intro + _table(("operator", "where"), rows)) if rows else ""


def _verification(comparisons: Sequence[tuple[str, Comparison]]) -> str:
    rows = [
        (
            _name(name),
            escape(c.subject),
            escape(c.inputs),
            _number(f"<span class={'good' if c.passed else 'bad'}>{c.relative:.1e}</span>"),
            _number("measured" if c.allowed is None else f"{c.allowed:.0e}"),
            escape(c.precision),
        )
        for name, c in comparisons
    ]
    intro = "<p class=soft>Largest difference of an output, over its largest value.</p>"
    columns = ("after", "compared", "on", "#difference", "#allowed", "in")
    return _section("How it was verified", intro + _table(columns, rows)) if rows else ""


def _passes(report: Account) -> str:
    rows = [
        (
            _number(str(each.position + 1)),
            f"<code>{escape(each.text)}</code>",
            escape(each.preserves),
            "changed" if each.changed else "<span class=soft>no change</span>",
            _number(f"{amount(each.before.flops)} → {amount(each.after.flops)}"),
            _number(seconds(each.seconds)),
            _number(seconds(each.verify_seconds)),
        )
        for each in report.passes
    ]
    columns = ("#", "pass", "preserves", "", "#flops", "#time", "#verification")
    return _section("Passes", _table(columns, rows)) if rows else ""


def _notes(report: Account) -> str:
    notes = [*report.notes, *(note for each in report.passes for note in each.notes)]
    return _section("Notes", _bullets(notes)) if notes else ""


def _footer(report: Account) -> str:
    times = ", ".join(f"{name} {seconds(spent)}" for name, spent in report.timings.items())
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"<h2>How it was made</h2><p class=soft>{escape(times)}. Seed {report.seed}, verification: "
        f"{escape(report.verify)}. {escape(versions)}.</p>"
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a column whose name starts with # holds numbers."""
    head = "".join(
        f"<th class=n>{escape(c[1:])}</th>" if c.startswith("#") else f"<th>{escape(c)}</th>" for c in columns
    )
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _number(text: str) -> str:
    return f"<td class=n>{text}</td>"


def _bar(part: float, whole: float) -> str:
    share = 100 * min(part / whole, 1) if whole else 0
    return f'<div class=bar><i style="width:{share:.1f}%"></i></div>'


def _folded(summary: str, items: Sequence[str]) -> str:
    if not items:
        return f"<code>{escape(summary)}</code>"
    listed = "<br>".join(f"<code>{escape(item)}</code>" for item in items)
    return f"<details><summary>{escape(summary)}</summary>{listed}</details>"


def _bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""

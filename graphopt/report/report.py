"""Hold the account of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cost import Cost
from graphopt.report.inspection import FrozenRow, UnknownRow
from graphopt.report.records import BudgetLine, Comparison, PassRecord, Site
from graphopt.report.wording import amount, bytes_of, listing, percent, plural

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Report"]


@dataclass
class Report:
    """The account of one run: what was done, what was not, and why. Printed as tables, in a terminal and in Jupyter.

    Attributes:
        model: The model's name.
        target: The target's name.
        pipeline: The passes that ran, as text that parses.
        seed: What everything random was seeded with.
        verify: When promises were checked: "each", "final" or "off".
        before: What the model cost.
        after: What it costs now.
        versions: The versions of graphopt and of what it rests on.
        budget: What was asked for and what was reached, by dimension.
        passes: What each pass did.
        frozen: Why dimensions of parameters must stay whole, in the model as it came.
        unknown: The operators without an axis rule, in the model as it came.
        notes: What capture and the target had to say.
        warnings: What the reader must not miss.
        comparisons: How outputs were compared, over the whole run.
        timings: Seconds by stage.
        score: What the caller's `evaluate` gave before and after; None without one.
        artifacts: The files that were written, by kind.
    """

    model: str
    target: str
    pipeline: str
    seed: int
    verify: str
    before: Cost
    after: Cost
    versions: Mapping[str, str] = field(default_factory=dict)
    budget: list[BudgetLine] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    frozen: list[FrozenRow] = field(default_factory=list)
    unknown: list[UnknownRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    score: tuple[float, float] | None = None
    artifacts: dict[str, str] = field(default_factory=dict)

    # -- in words --

    @property
    def groups(self) -> list[Site]:
        """The groups that lost indices, over all passes."""
        return [site for each in self.passes for site in each.applied]

    @property
    def left_alone(self) -> list[Site]:
        """The sites that were left alone, over all passes."""
        return [site for each in self.passes for site in each.skipped]

    @property
    def changed(self) -> bool:
        """Say whether any pass changed anything."""
        return any(each.changed for each in self.passes)

    def sentences(self) -> Iterator[str]:
        """Yield what was done and what came of it, in plain words, most important first."""
        if self.changed:
            yield (
                f"Of the model's multiply-adds {percent(self.after.macs, self.before.macs)} are left, of its "
                f"parameters {percent(self.after.params, self.before.params)}: {amount(self.before.flops)} → "
                f"{amount(self.after.flops)} flops, {amount(self.before.params)} → {amount(self.after.params)} "
                f"parameters, {bytes_of(self.before.weight_bytes)} → {bytes_of(self.after.weight_bytes)} of weights."
            )
        else:
            yield "The model computes and costs what it did."
        groups = [site for site in self.groups if "kept" in site.facts]
        if groups:
            size, kept = (sum(site.facts[key] for site in groups) for key in ("size", "kept"))
            removed = plural(size - kept, "index", "indices")
            yield f"{removed} of {size:,} were removed, in {plural(len(groups), 'group')}."
        for line in self.budget:
            met = "" if line.met else ", which is above the target"
            yield (
                f"Budget of {line.dimension}: at most {amount(line.target)} ({percent(line.target, line.original)} of "
                f"the original), and {amount(line.achieved)} ({percent(line.achieved, line.original)}) reached{met}."
            )
        if self.score is not None:
            before, after = self.score
            yield f"The caller's metric was {before:.4g} before and is {after:.4g} now ({after - before:+.4g})."
        if self.artifacts:
            yield f"Written: {listing(sorted(self.artifacts.values()), 6)}."

    # -- as data --

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values: strings, numbers, lists and dictionaries."""
        return {
            "model": self.model,
            "target": self.target,
            "pipeline": self.pipeline,
            "seed": self.seed,
            "verify": self.verify,
            "versions": dict(self.versions),
            "summary": list(self.sentences()),
            "warnings": list(self.warnings),
            "cost": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "budget": [line.to_dict() for line in self.budget],
            "score": {"before": self.score[0], "after": self.score[1]} if self.score else None,
            "passes": [each.to_dict() for each in self.passes],
            "comparisons": [each.to_dict() for each in self.comparisons],
            "frozen": [asdict(row) for row in self.frozen],
            "unknown": [asdict(row) for row in self.unknown],
            "notes": list(self.notes),
            "timings": dict(self.timings),
            "artifacts": dict(self.artifacts),
        }

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite become strings, which JSON can hold."""
        return json.dumps(_finite(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)

    def save_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    # -- to look at --

    def to_html(self) -> str:
        """Return the report as a page that needs nothing but itself."""
        from graphopt.report.html import page

        return page(self)

    def save_html(self, path: str | Path) -> None:
        """Write the report as a page that needs nothing but itself."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        from graphopt.report.html import fragment

        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from graphopt.report.terminal import report_parts

        yield from report_parts(self)

    def __str__(self) -> str:
        from graphopt.report.terminal import as_text

        return as_text(self)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:  # infinite or not a number
        return str(value)
    return value

"""Hold what happened, and what there is, as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from graphopt.cost import Cost
from graphopt.report.wording import amount, bytes_of, listing, percent, plural
from graphopt.verify import Difference

__all__ = ["Account", "BudgetLine", "Comparison", "FrozenRow", "GroupRow", "PassRecord", "Site", "UnknownRow"]


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a pass acted or declined to.

    Attributes:
        name: The place: a group's name, or a node's.
        applied: Whether the pass acted.
        reason: What it did, or why it did not, with the numbers.
        facts: Numbers and names for tables. For a group: `role`, `size`, `kept`, `places` (what is sliced),
            `normalised` (nodes that normalise over it), `flops` and `params` that involve it, and `layer`, where its
            name does not say where it is.
    """

    name: str
    applied: bool
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain values."""
        return {"name": self.name, "applied": self.applied, "reason": self.reason, **self.facts}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison of outputs.

    Attributes:
        subject: What was compared with what, in words.
        relative: The largest difference over the largest reference value, of the worst output.
        output: The position of that output among the flattened outputs.
        precision: What was computed in, "float32" or "float64".
        allowed: The largest difference that passes; None where a difference is expected and only measured.
        inputs: What the models were run on, in words.
    """

    subject: str
    relative: float
    output: int
    precision: str
    allowed: float | None
    inputs: str

    @classmethod
    def of(cls, subject: str, difference: Difference, inputs: str, *, measured: bool = False) -> Comparison:
        """Make one of a difference; `measured` says that any size of it is fine."""
        precision = str(difference.precision).removeprefix("torch.")
        allowed = None if measured else difference.allowed
        return cls(subject, difference.relative, difference.output, precision, allowed, inputs)

    @property
    def passed(self) -> bool:
        """Say whether the difference is one that is allowed."""
        return self.allowed is None or self.relative <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        against = "measured only" if self.allowed is None else f"allowed {self.allowed:.0e}"
        found = f"relative difference {self.relative:.1e} in output {self.output}, in {self.precision} ({against})"
        return f"{self.subject}: {found}, on {self.inputs}"


@dataclass(slots=True)
class PassRecord:
    """What one pass of a pipeline did.

    Attributes:
        position: Where it stands in the pipeline, from 0.
        name: Its name.
        text: Its name and options, as text.
        preserves: What it promises.
        changed: Whether the graph differs afterwards.
        seconds: How long it ran, verification not included.
        verify_seconds: How long its verification took.
        before: What the model cost before it.
        after: What the model costs after it.
        sites: What it did and what it did not, and why.
        comparisons: How its promise was checked right after it; empty where it was not.
        left_alone: Groups and sites that verification refused, each with the difference that was found.
        left_out: Why the pass was left out: it failed, and what it does could be done without. "" where it was not.
        notes: What the pass said of the run as a whole.
    """

    position: int
    name: str
    text: str
    preserves: str
    changed: bool
    before: Cost
    after: Cost
    seconds: float = 0.0
    sites: tuple[Site, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    left_out: str = ""
    notes: tuple[str, ...] = ()
    verify_seconds: float = 0.0

    @property
    def applied(self) -> list[Site]:
        """The sites where the pass acted."""
        return [site for site in self.sites if site.applied]

    @property
    def skipped(self) -> list[Site]:
        """The sites that the pass left alone."""
        return [site for site in self.sites if not site.applied]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "position": self.position,
            "name": self.name,
            "text": self.text,
            "preserves": self.preserves,
            "changed": self.changed,
            "seconds": self.seconds,
            "verify_seconds": self.verify_seconds,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "sites": [site.to_dict() for site in self.sites],
            "comparisons": [each.to_dict() for each in self.comparisons],
            "left_alone": dict(self.left_alone),
            "left_out": self.left_out,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """One dimension of a budget: what it may be at most, and what it is, in the unit of the dimension."""

    dimension: str
    original: float
    target: float
    achieved: float

    @property
    def met(self) -> bool:
        """Say whether the target is kept."""
        return self.achieved <= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return the line as plain values."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group of coupled indices.

    `params` and `flops` are those of everything that its indices take part in: what would be gone without the group.
    `normalised` names the nodes that normalise over it; the other indices' results change when one of them goes.
    `layer` is where it is, if its name does not say it.
    """

    name: str
    role: str
    size: int
    places: tuple[str, ...]
    params: int
    flops: int
    normalised: tuple[str, ...]
    layer: str = ""


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """One reason why dimensions of parameters must stay whole.

    `places` are these dimensions, `nodes` the operators that demand it. `params` are the elements of those parameters,
    `flops` the operations along those dimensions of the operators that read them. One parameter may stand under several
    reasons.
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


@dataclass
class Account:
    """What one run did, what it did not, and why, as data; :class:`~graphopt.report.Report` adds what it looks like.

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
        """The groups that lost indices; of one that several passes cut, what it was at first and what it is at last."""
        found: dict[str, Site] = {}
        for site in (s for each in self.passes for s in each.applied if "kept" in s.facts):
            first = found.setdefault(site.name, site)
            if first is not site:
                size, kept = first.facts["size"], site.facts["kept"]
                reason = f"kept {kept} of {plural(size, 'index', 'indices')}, in several steps"
                found[site.name] = replace(first, reason=reason, facts={**first.facts, "kept": kept})
        return list(found.values())

    @property
    def others(self) -> list[tuple[str, Site]]:
        """The sites, other than groups, where a pass acted, each with the name of the pass."""
        return [(each.name, site) for each in self.passes for site in each.applied if "kept" not in site.facts]

    @property
    def left_alone(self) -> list[tuple[str, Site]]:
        """The sites that were left alone, each with the name of the pass; no group that another pass cut."""
        cut = {site.name for site in self.groups}
        found: dict[tuple[str, str], Site] = {}
        for each in self.passes:
            for site in each.skipped:
                if not ("kept" in site.facts and site.name in cut):
                    found[each.name, site.name] = site
        return [(name, site) for (name, _), site in found.items()]

    @property
    def compared(self) -> list[tuple[str, Comparison]]:
        """All comparisons, each with the name of the pass after which it was made, "" for those at the end."""
        inside = [(each.name, found) for each in self.passes for found in each.comparisons]
        return inside + [("", found) for found in self.comparisons]

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
        groups = self.groups
        if groups:
            size, kept = (sum(site.facts[key] for site in groups) for key in ("size", "kept"))
            removed = plural(size - kept, "index", "indices")
            yield f"{removed} of {size:,} were removed, in {plural(len(groups), 'group')}."
        done = Counter(name for name, _ in self.others)
        if done:
            told = listing([f"{name} at {plural(count, 'site')}" for name, count in done.items()], len(done))
            yield f"Besides: {told}."
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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:  # infinite or not a number
        return str(value)
    return value

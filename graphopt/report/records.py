"""Hold what happened, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from graphopt.cost import Cost
from graphopt.verify import TOLERANCE, Difference

__all__ = ["BudgetLine", "Comparison", "PassRecord", "Site"]


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a pass acted or declined to.

    Attributes:
        name: The place: a group's name, or a node's.
        applied: Whether the pass acted.
        reason: What it did, or why it did not, with the numbers.
        facts: Numbers and names for tables. For a group: `role`, `size`, `kept`, `places` (what is sliced),
            `normalised` (nodes that normalise over it), and `flops` and `params` that involve it.
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
        allowed = None if measured else TOLERANCE.get(difference.precision, TOLERANCE[torch.float32])
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
        left_alone: Groups that verification refused, each with the difference that was found.
        notes: What the pass said of the run as a whole.
    """

    position: int
    name: str
    text: str
    preserves: str
    changed: bool
    seconds: float
    before: Cost
    after: Cost
    sites: tuple[Site, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
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

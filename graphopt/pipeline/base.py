"""Say what a pass is, what it is given, and what it hands back.

What may live here: :class:`Pass`, :class:`Context`, :class:`PassResult` and what they are made of. How passes are run,
checked and rolled back stands in ``runner``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from graphopt.allocation import Budget
from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.cost import Cost
from graphopt.graph import Graph
from graphopt.importance import Loss
from graphopt.pipeline import options
from graphopt.pipeline.text import Call, print_literal
from graphopt.plan import Plan
from graphopt.report import Site

__all__ = ["Context", "Pass", "PassResult", "Preserves", "Reference", "Removal"]


class Preserves(StrEnum):
    """What a pass promises of its result; the pipeline checks it."""

    EXACT = "exact"
    """The outputs are those of the graph before, up to round-off."""
    MASKED = "masked"
    """The outputs are those of the graph before with the removed indices masked, up to round-off."""
    APPROXIMATE = "approximate"
    """The outputs differ; by how much is measured and reported."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Say which indices a pass kept: ``keep`` names free groups of ``typing``, which types the graph from before."""

    typing: Typing
    keep: Mapping[Atom, Indices]


@dataclass(frozen=True, slots=True)
class PassResult:
    """Hold what a pass made.

    Attributes:
        graph: The graph after the pass: the one it was handed, edited, or another one.
        removal: What was removed, from a pass that preserves the masked meaning; None where nothing was.
        retrained: Parameters were trained, so that the model from before is no measure any more.
    """

    graph: Graph
    removal: Removal | None = None
    retrained: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """The model that the graph is measured against after indices were removed from it.

    Attributes:
        graph: The graph from before the removals, as the last lossless change left it.
        plan: What is left of that graph's tensors, by the names they have there and still have.
    """

    graph: Graph
    plan: Plan


@dataclass(frozen=True)
class Pass(ABC):
    """Do one thing to a graph. Subclasses are frozen dataclasses whose fields, at most six, are their options.

    The pipeline hands :meth:`run` a graph that the pass owns: it may edit it, or build another one. Tensors are shared
    with the graph from before, so a pass puts new tensors in place of old ones and never writes into one. Whether
    something changed, and whether the promise in ``preserves`` was kept, the pipeline finds out by itself.
    """

    name: ClassVar[str]
    """What texts call the pass: words in lower case, joined by hyphens, the first one a verb."""
    preserves: ClassVar[Preserves]
    """What the pass promises."""
    needs_values: ClassVar[bool] = True
    """Whether the pass computes with the values of parameters, and so cannot run where they are not in memory."""

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> PassResult:
        """Apply the pass.

        Every candidate site ends in :meth:`Context.applied` or :meth:`Context.skipped`; a refusal is no error. A pass
        that asks :meth:`Context.allows` before it acts on a site can be run again without the sites that made the
        result wrong.

        Args:
            graph: the graph to change; the pass owns it, but not its tensors.
            context: what the pass may look at, and where it says what it did.

        Raises:
            PassError: if the pass cannot go on; the graph from before stays.
        """

    def __str__(self) -> str:
        """Return the pass as text that parses back to it; options at their defaults are left out."""
        return print_literal(self.call())

    def call(self) -> Call:
        """Return name and options in the form of the textual grammar."""
        return Call(self.name, options.encode(self))


@dataclass(frozen=True)
class Context:
    """What one run of one pass may look at, and where it says what it did.

    Attributes:
        original: What the model cost when it entered the pipeline: fractions of a budget refer to it.
        budget: What the caller asked for, where the pass has no budget of its own.
        channel_multiple: Sizes that the target computes in multiples of; 1 where it makes no difference.
        calibration: Batches of inputs, or of (inputs, labels); can be iterated any number of times.
        loss: Makes a scalar of outputs and labels; None stands for cross entropy.
        evaluate: The caller's own metric of a module, higher is better.
        seed: Seeds whatever is random.
        reference: What the model was before indices were removed; None where none were since the last lossless change.
        train: Trains a module in place: what the caller gave as fine-tuning.
        left_alone: Groups that must stay whole, and sites that must stay as they are, by name, each with the reason:
            what verification refused before.
        sites: What was done and what was not, in the order in which the pass said so.
        notes: Sentences for the report.
    """

    original: Cost
    budget: Budget | None = None
    channel_multiple: int = 1
    calibration: Iterable[Any] | None = None
    loss: Loss | None = None
    evaluate: Callable[[Any], float] | None = None
    seed: int = 0
    reference: Reference | None = None
    train: Callable[[Any], object] | None = None
    left_alone: Mapping[str, str] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def allows(self, site: str) -> bool:
        """Say whether the pass may act on ``site``; a refusal is written down, with the reason."""
        why = self.left_alone.get(site)
        if why is not None:
            self.skipped(site, f"left alone: with it the result was wrong ({why})")
        return why is None

    def applied(self, site: str, what: str = "", **facts: Any) -> None:
        """Say that the pass acted on ``site``: what it did, and the numbers for the report."""
        self.sites.append(Site(site, True, what, facts))

    def skipped(self, site: str, reason: str, **facts: Any) -> None:
        """Say that the pass left ``site`` alone, and why, with the numbers."""
        self.sites.append(Site(site, False, reason, facts))

    def note(self, sentence: str) -> None:
        """Say something about the run as a whole."""
        self.notes.append(sentence)

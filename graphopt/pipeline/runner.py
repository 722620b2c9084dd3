"""Run a pipeline: apply each pass, check its promise, take it back and name it where it broke the promise.

What may live here: the order of events. What a promise is and how it is checked stands in ``promises``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from graphopt.cost import Cost, CostModel
from graphopt.dialects import infer
from graphopt.errors import BudgetError, GraphOptError, PassError, VerificationError
from graphopt.pipeline.base import Context, Pass, PassResult, Preserves, Reference
from graphopt.pipeline.promises import Failure, Promise, bisect, find_offenders, measure, same
from graphopt.plan import Plan
from graphopt.report import Comparison, PassRecord
from graphopt.verify import remembering

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.pipeline.pipeline import Pipeline
    from graphopt.pipeline.promises import Inputs

__all__ = ["Observer", "Outcome", "Verify", "observer", "run", "watching"]

Verify = Literal["each", "final", "off"]

MOST_ATTEMPTS: Final = 8
"""How often a pass is run again on fewer groups after verification refused some."""


class Observer:
    """Watch a run. Every method does nothing here; override those of interest."""

    def stage(self, name: str) -> None:
        """Learn that a stage begins, such as "capture" or "verify prune-channels"."""

    def begins(self, position: int, graph: Graph) -> None:
        """Learn that the pass at this position starts from this graph."""

    def goes_on(self, position: int) -> bool:
        """Say whether the pass at this position shall run; the first that shall not ends the pipeline."""
        del position
        return True

    def changed(self, record: PassRecord, graph: Graph) -> None:
        """Learn that a pass changed the graph, and kept its promise where that is checked at once."""


_WATCHING: ContextVar[Observer] = ContextVar("watching")


@contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Let ``observer`` learn of every run within the block, in this thread or task."""
    token = _WATCHING.set(observer)
    try:
        yield
    finally:
        _WATCHING.reset(token)


def observer() -> Observer:
    """Return the observer of the innermost :func:`watching`; outside of any, one that does nothing."""
    return _WATCHING.get(Observer())


@dataclass
class Outcome:
    """What became of a graph.

    ``plan`` says which indices of the input graph's tensors are left, over all passes; ``comparisons`` are those made
    after the last pass, where promises are checked at the end.
    """

    graph: Graph
    plan: Plan
    records: list[PassRecord] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def run(
    pipeline: Pipeline,
    graph: Graph,
    context: Context,
    *,
    inputs: Sequence[tuple[str, Inputs]],
    verify: Verify = "each",
    forgiving: bool = False,
) -> Outcome:
    """Run the passes of ``pipeline`` in order; ``graph`` itself is not changed.

    Args:
        pipeline: the passes.
        graph: what they start from.
        context: what they may look at; each run of a pass gets a copy with empty lists.
        inputs: what promises are checked on, each with a description.
        verify: check every promise after its pass ("each"), all of them after the last pass ("final"), or none ("off").
        forgiving: go on without a lossless pass that broke off or broke its promise, and write down why.

    Raises:
        PassError: a pass broke off.
        VerificationError: a pass broke its promise.
        BudgetError: a budget cannot be met.
    """
    with remembering():
        return _Run(pipeline, context, inputs, verify, forgiving).all(graph)


@dataclass
class _Attempt:
    """One run of a pass: the graph after it, and the groups or sites to blame where that graph is wrong."""

    result: PassResult
    promise: Promise
    after: Graph
    comparisons: list[Comparison] = field(default_factory=list)
    blamed: dict[str, str] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        pipeline: Pipeline,
        context: Context,
        inputs: Sequence[tuple[str, Inputs]],
        verify: Verify,
        forgiving: bool,
    ) -> None:
        self.pipeline = pipeline
        self.context = context
        self.inputs = inputs
        self.verify = verify
        self.forgiving = forgiving
        self.observer = observer()
        self.open: list[Promise] = []
        self.settled: list[Comparison] = []

    def all(self, graph: Graph) -> Outcome:
        outcome = Outcome(graph, Plan())
        cost = self.context.original
        for position, each in enumerate(self.pipeline):
            if not self.observer.goes_on(position):
                break
            self.observer.begins(position, outcome.graph)
            try:
                record, attempt = self._one(position, each, outcome.graph, cost)
            except (PassError, VerificationError) as error:
                if not self.forgiving or each.preserves is not Preserves.EXACT:
                    raise
                outcome.records.append(self._left_out(position, each, cost, error))
                continue
            removal = attempt.promise.removal
            if removal is not None:
                outcome.plan = outcome.plan.then(Plan.of(removal.typing, removal.keep))
            if record.changed:
                self._follow(each, attempt)
            outcome.graph, cost = attempt.after, record.after
            outcome.records.append(record)
            if record.changed:
                self.observer.changed(record, outcome.graph)
        self._settle(outcome.graph)
        outcome.comparisons = self.settled
        return outcome

    def _left_out(self, position: int, each: Pass, cost: Cost, error: GraphOptError) -> PassRecord:
        """Record that a pass was left out because it failed."""
        return PassRecord(
            position=position,
            name=each.name,
            text=str(each),
            preserves=str(each.preserves),
            changed=False,
            before=cost,
            after=cost,
            left_out=str(error),
        )

    def _follow(self, each: Pass, attempt: _Attempt) -> None:
        """Let the reference follow a change: it is what stood before the removals since the last lossless change."""
        promise = attempt.promise
        reference, removal = self.context.reference, promise.removal
        if removal is not None:
            if reference is None or not same(promise.before, promise.edited):
                reference = Reference(removal.typing.graph, Plan())
            reference = replace(reference, plan=reference.plan.then(Plan.direct(removal.typing, removal.keep)))
        elif attempt.result.retrained or each.preserves is not Preserves.APPROXIMATE:
            reference = None
        self.context = replace(self.context, reference=reference)

    def _one(self, position: int, each: Pass, before: Graph, cost: Cost) -> tuple[PassRecord, _Attempt]:
        """Run one pass until its promise is kept."""
        refused: dict[str, str] = {}
        seconds = verify_seconds = 0.0
        for _ in range(MOST_ATTEMPTS):
            self.observer.stage(each.name)
            left_alone = {**self.context.left_alone, **refused}
            context = replace(self.context, left_alone=left_alone, sites=[], notes=[])
            start = time.perf_counter()
            try:
                result = self._applied(position, each, before, context)
            except BudgetError as error:
                if not refused:
                    raise
                raise VerificationError(
                    f"{self._where(position)}: {_refusals(refused)}. Without them the budget cannot be met: {error}"
                ) from error
            middle = time.perf_counter()
            attempt = self._checked(position, each, result, before, context)
            seconds += middle - start
            verify_seconds += time.perf_counter() - middle
            if not attempt.blamed:
                break
            refused |= attempt.blamed
        else:
            raise VerificationError(
                f"{self._where(position)}: {MOST_ATTEMPTS} attempts ended in wrong models; {_refusals(refused)}. "
                "The model was left as it was before the pass; exclude these groups by name, or leave the pass out"
            )
        changed = not same(before, attempt.after)
        record = PassRecord(
            position=position,
            name=each.name,
            text=str(each),
            preserves=str(each.preserves),
            changed=changed,
            seconds=seconds,
            verify_seconds=verify_seconds,
            before=cost,
            after=CostModel(infer(attempt.after)).cost() if changed else cost,
            sites=tuple(context.sites),
            comparisons=tuple(attempt.comparisons),
            left_alone=refused,
            notes=tuple(context.notes),
        )
        return record, attempt

    def _applied(self, position: int, each: Pass, before: Graph, context: Context) -> PassResult:
        owned = before.clone()
        versions = {name: tensor._version for name, tensor in before.tensors().items()}
        try:
            result = each.run(owned, context)
        except PassError as error:
            raise PassError(f"{self._where(position)}: {error}") from error
        except GraphOptError as error:
            error.add_note(f"in {self._where(position)}")
            raise
        except Exception as error:
            raise PassError(
                f"{self._where(position)} broke off: {type(error).__name__}: {error}. The model was left as it was"
            ) from error
        written = [name for name, tensor in before.tensors().items() if tensor._version != versions[name]]
        if written:
            raise PassError(
                f"{self._where(position)} wrote into the tensor '{written[0]}', which it shares with the graph from "
                "before; a pass puts a new tensor in place of the old one (Graph.set_tensor)"
            )
        return result

    def _checked(self, position: int, each: Pass, result: PassResult, before: Graph, context: Context) -> _Attempt:
        """Rewrite, and check the promise now, later or not at all."""
        promise = Promise.of(result, before)
        attempt = _Attempt(result, promise, promise.edited)
        try:
            attempt.after = promise.rewritten()
        except Exception as error:  # a resizer that meets what it does not expect raises anything
            failure = Failure(f"rewriting broke off: {type(error).__name__}: {error}")
            if self.verify == "each" and promise.removal is not None:
                attempt.blamed = self._blamed(position, promise, failure, context)
                return attempt
            raise PassError(
                f"{self._where(position)}: {failure}. The model was left as it was; verify='each' finds the groups "
                "that cannot be cut, and leaves them alone"
            ) from error
        if self.verify == "off":
            return attempt
        if each.preserves is Preserves.APPROXIMATE:
            self._settle(before)
            self.observer.stage(f"compare {each.name}")
            attempt.comparisons = [measure(each.name, before, attempt.after, *given) for given in self.inputs]
        elif self.verify == "final":
            self._postpone(position, promise)
        elif promise.removal is not None or not same(before, attempt.after):
            self.observer.stage(f"verify {each.name}")
            for found in promise.comparisons(attempt.after, self.inputs):
                if isinstance(found, Failure) or not found.passed:
                    attempt.blamed = self._blamed(position, promise, found, context)
                    break
                attempt.comparisons.append(found)
        return attempt

    def _blamed(self, position: int, promise: Promise, found: Failure | Comparison, context: Context) -> dict[str, str]:
        """Return the groups or sites without which the promise is kept, each with what went wrong."""
        if promise.removal is not None:
            self.observer.stage("find the groups to blame")
            offenders = find_offenders(promise, self.inputs)
        else:
            self.observer.stage("find the sites to blame")
            offenders = self._find_sites(position, promise.before, context)
        if not offenders:
            raise VerificationError(_broken(self._where(position), promise, found))
        return offenders

    def _find_sites(self, position: int, before: Graph, context: Context) -> dict[str, str]:
        """Return the sites without which a lossless pass is lossless; none where it does not spare sites when told."""
        sites = list(dict.fromkeys(site.name for site in context.sites if site.applied))

        def wrong(allowed: Sequence[str]) -> str | None:
            spared = {site: "tried without" for site in sites if site not in allowed}
            attempt = replace(context, left_alone={**context.left_alone, **spared}, sites=[], notes=[])
            result = self._applied(position, self.pipeline[position], before, attempt)
            promise = Promise.of(result, before)
            return promise.broken(promise.rewritten(), self.inputs)

        return bisect(sites, wrong) if sites and wrong([]) is None else {}

    # -- promises that are checked at the end --

    def _postpone(self, position: int, promise: Promise) -> None:
        """Keep a promise for later; one that must leave outputs as they are joins the one before it."""
        if self.open and promise.removal is None:
            self.open[-1] = self.open[-1].extended(position)
            return
        if self.open:
            self.open[-1] = self.open[-1].ended(promise.before)
        self.open.append(promise.extended(position))

    def _settle(self, last: Graph) -> None:
        """Check the promises that are open; ``last`` is the graph after the latest of them."""
        for promise in self.open:
            where = " and ".join(self._where(p) for p in promise.positions)
            self.observer.stage("verify")
            for found in promise.comparisons(promise.after or last, self.inputs):
                if isinstance(found, Failure) or not found.passed:
                    raise VerificationError(
                        f"{_broken(where, promise, found)}; verify='each' finds the groups that are to blame"
                    )
                self.settled.append(found)
        self.open = []

    # -- words --

    def _where(self, position: int) -> str:
        return f"pass {position + 1} '{self.pipeline[position].name}' of the pipeline \"{self.pipeline}\""


def _broken(where: str, promise: Promise, found: Failure | Comparison) -> str:
    return f"{where} did not keep its promise ({promise.words}): {found}. The model was left as it was before"


def _refusals(refused: Mapping[str, str]) -> str:
    return "; ".join(f"changing {name} gave a wrong model ({found})" for name, found in refused.items())

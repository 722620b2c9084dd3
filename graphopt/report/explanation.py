"""Say in words what ties a dimension, or forbids that it shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from graphopt.axes.coupling import Explanation, Step, Tie
from graphopt.errors import PipelineError, nearest_name
from graphopt.graph import OWNER
from graphopt.report.inspection import Inspection
from graphopt.report.wording import listing, plural

__all__ = ["explanation_lines", "print_explanation"]

MOST_PLACES = 16
"""Places whose paths are printed; the rest is counted."""


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
